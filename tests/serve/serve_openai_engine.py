"""Test doubles of the engine client, image loader and slot queue, in the process of the test."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from typing import Optional

import numpy as np
from PIL import Image

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.processing.images import load_image
from paddlemix_qwenvl_plugin.runtime.generation import Generation
from paddlemix_qwenvl_plugin.serve.engine_api import (
    Ended,
    EngineRequest,
    EngineStats,
    EngineUnavailable,
    Token,
    TokenStream,
)
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.service import LoadedImage
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

N_CACHED = 7  # the number of cached prompt tokens that this engine reports for every request


def logprob_of(token: int) -> float:
    """Log probability that this engine reports for a token; a made-up value, different for each token."""
    return -1 - token / 1024


def top_logprobs_of(token: int, n: int) -> tuple[tuple[int, float], ...]:
    """The n (token, log probability) that this engine reports for a generated token, which is the first of them."""
    return tuple((token + i, logprob_of(token + i)) for i in range(n))


class Stream:
    """TokenStream of an `Engine`.

    Attributes:
        n_sent: number of tokens sent so far.
        n_tokens_before_submit: number of tokens that other requests had got when this request was submitted.
    """

    def __init__(self, engine: Engine, request: EngineRequest, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.ended: Optional[Ended] = None
        self.n_sent = 0
        self.n_tokens_before_submit = sum(stream.n_sent for stream in engine.submitted)
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Token] | QwenVLError | Ended] = asyncio.Queue()

    def put(self, item: list[Token] | QwenVLError | Ended) -> None:
        """Deliver tokens, an error or the end; called from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop of the server is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        while self.ended is None:
            item = await self._queue.get()
            if isinstance(item, QwenVLError):
                raise item
            if isinstance(item, Ended):
                self.ended = item
            else:
                yield item

    def cancel(self) -> None:
        self._engine.vl._loop.cancel(self.generation)
        self._engine.wake.set()


class Engine:
    """EngineClient that runs a QwenVL in a thread; without adapters, and with the log probabilities of `logprob_of`.

    Attributes:
        step_seconds: minimum duration of a step.
        submitted: the streams of all requests so far.
        unavailable: whether `submit` raises EngineUnavailable.
        may_step: event; the engine runs steps while it is set.
    """

    def __init__(self, vl: QwenVL) -> None:
        self.vl = vl
        self.ready = True
        self.restarts = 0
        self.stats = EngineStats()
        self.may_step = threading.Event()
        self.wake = threading.Event()
        self.reset()
        self._active: list[Stream] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.step_seconds = 0.0
        self.submitted: list[Stream] = []
        self.unavailable = False
        self.may_step.set()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self._stopping = True
        self.wake.set()

    def submit(self, request: EngineRequest) -> TokenStream:
        if self.unavailable:
            raise EngineUnavailable("the engine is starting")
        size = self.vl.config.visual.image_size
        for image in request.images:
            assert image.shape == (size, size, 3)
            assert image.dtype == np.uint8
        images = self.vl.image_inputs([Image.fromarray(image) for image in request.images])
        generation = self.vl.generation(
            request.prompt, images, request.stop_token_ids, request.options, request.generated
        )
        stream = Stream(self, request, generation)
        self.submitted.append(stream)
        self._active.append(stream)
        self.vl._loop.submit(generation)
        self.wake.set()
        return stream

    def die(self) -> None:
        """Fail all requests as the exit of the engine process does."""
        self.unavailable = True
        for stream in list(self._active):
            stream.put(EngineUnavailable("the engine died; a new one is starting"))
            self.vl._loop.cancel(stream.generation)

    @property
    def idle(self) -> bool:
        return not self._active

    def _run(self) -> None:
        while not self._stopping:
            if not self._active:
                self.wake.wait()
                self.wake.clear()
                continue
            self.may_step.wait()
            start = time.perf_counter()
            self.vl._loop.step()
            for stream in list(self._active):
                self._deliver(stream)
            time.sleep(max(0.0, self.step_seconds - (time.perf_counter() - start)))

    def _deliver(self, stream: Stream) -> None:
        """Send the tokens that a request has generated since the last call, and its end."""
        generation = stream.generation
        finished, error = generation.finished, generation.error
        new_ids = generation.tokens[stream.n_sent :]
        stream.n_sent += len(new_ids)
        n_logprobs = stream.request.n_logprobs
        if n_logprobs is None:
            tokens = [Token(id_) for id_ in new_ids]
        else:
            tokens = [Token(id_, logprob_of(id_), top_logprobs_of(id_, n_logprobs)) for id_ in new_ids]
        if tokens:
            stream.put(tokens)
        if finished:
            self._active.remove(stream)
            stream.put(error if isinstance(error, QwenVLError) else Ended(generation.finish_reason, N_CACHED))


class Images:
    """ImageLoader for data: URLs; `loaded` lists the URLs that it was asked to load."""

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self.loaded: list[str] = []

    async def load(self, url: str, param: str) -> LoadedImage:
        self.loaded.append(url)
        await asyncio.sleep(0)
        try:
            if not url.startswith("data:"):
                raise QwenVLError("only data: URLs are supported")
            image = load_image(url)
        except QwenVLError as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error
        size = (self._image_size, self._image_size)
        return LoadedImage(np.asarray(image.resize(size, Image.Resampling.BICUBIC)), image.size)

    async def close(self) -> None:
        pass


class NoLimits:
    """Admission without a limit.

    Attributes:
        slots_in_use: number of slots in use.
        max_slots_in_use: maximum of slots_in_use so far.
        keys: the API key hash of each admitted request, None without a key.
        refuse_with: error with which requests are refused, if any.
    """

    def __init__(self) -> None:
        self.slots_in_use = self.max_slots_in_use = 0
        self.keys: list[Optional[str]] = []
        self.refuse_with: Optional[ApiError] = None

    @contextlib.asynccontextmanager
    async def slots(self, n: int, key: Optional[str]) -> AsyncIterator[None]:
        if self.refuse_with is not None:
            raise self.refuse_with
        self.keys.append(key)
        self.slots_in_use += n
        self.max_slots_in_use = max(self.max_slots_in_use, self.slots_in_use)
        try:
            yield
        finally:
            self.slots_in_use -= n
