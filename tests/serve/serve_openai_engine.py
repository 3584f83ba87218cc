"""In-process implementations of the handlers' protocols: engine, image loader, unlimited queue."""

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

N_CACHED = 7  # what this engine says of each prompt


def logprob(token: int) -> float:
    """Token with the log probabilities of this engine."""
    return -1 - token / 1024


def likeliest(token: int, n: int) -> tuple[tuple[int, float], ...]:
    return tuple((token + i, logprob(token + i)) for i in range(n))


class Stream:
    """A TokenStream of the engine below."""

    def __init__(self, engine: Engine, request: EngineRequest, generation: Generation) -> None:
        self.request = request
        self.generation = generation
        self.ended: Optional[Ended] = None
        self.n_sent = 0
        self.n_before = sum(other.n_sent for other in engine.submitted)  # tokens that had been sent by then
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[list[Token] | QwenVLError | Ended] = asyncio.Queue()

    def put(self, item: list[Token] | QwenVLError | Ended) -> None:
        """Deliver tokens; called from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the server has gone
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
    """An EngineClient that runs a QwenVL in a thread.

    Attributes:
        step_seconds: how long a step takes at least.
        submitted: the streams of all requests so far.
        dead: whether requests are refused.
        going: whether steps are run.
    """

    def __init__(self, vl: QwenVL) -> None:
        self.vl = vl
        self.ready = True
        self.restarts = 0
        self.stats = EngineStats()
        self.going = threading.Event()
        self.wake = threading.Event()
        self.reset()
        self._active: list[Stream] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        self.step_seconds = 0.0
        self.submitted: list[Stream] = []
        self.dead = False
        self.going.set()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        self._stopping = True
        self.wake.set()

    def submit(self, request: EngineRequest) -> TokenStream:
        if self.dead:
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
        self.dead = True
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
            self.going.wait()
            start = time.perf_counter()
            self.vl._loop.step()
            for stream in list(self._active):
                self._hand_out(stream)
            time.sleep(max(0.0, self.step_seconds - (time.perf_counter() - start)))

    def _hand_out(self, stream: Stream) -> None:
        generation = stream.generation
        finished, error = generation.finished, generation.error
        new = generation.tokens[stream.n_sent :]
        stream.n_sent += len(new)
        n = stream.request.n_logprobs
        if new:
            stream.put([Token(t) if n is None else Token(t, logprob(t), likeliest(t, n)) for t in new])
        if finished:
            self._active.remove(stream)
            stream.put(error if isinstance(error, QwenVLError) else Ended(generation.finish_reason, N_CACHED))


class Images:
    """An ImageLoader of data: URLs; `loaded` has those of all requests."""

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self.loaded: list[str] = []

    async def load(self, url: str, param: str) -> LoadedImage:
        self.loaded.append(url)
        await asyncio.sleep(0)
        try:
            if not url.startswith("data:"):
                raise QwenVLError("only data: URLs here")
            image = load_image(url)
        except QwenVLError as error:
            raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from error
        size = (self._image_size, self._image_size)
        return LoadedImage(np.asarray(image.resize(size, Image.Resampling.BICUBIC)), image.size)

    async def close(self) -> None:
        pass


class NoLimits:
    """An Admission. `held` counts the slots in use, `most` the most of them at once; `keys` has the requests' keys."""

    def __init__(self) -> None:
        self.held = self.most = 0
        self.keys: list[Optional[str]] = []
        self.refuse: Optional[ApiError] = None

    @contextlib.asynccontextmanager
    async def slots(self, n: int, key: Optional[str]) -> AsyncIterator[None]:
        if self.refuse is not None:
            raise self.refuse
        self.keys.append(key)
        self.held += n
        self.most = max(self.most, self.held)
        try:
            yield
        finally:
            self.held -= n
