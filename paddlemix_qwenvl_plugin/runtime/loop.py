"""Continuous batching: the loop that runs steps for all requests."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.processing.images import normalise
from paddlemix_qwenvl_plugin.runtime.executor import NO_TOKEN, Executor, Picked
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.image_cache import ImageCache
from paddlemix_qwenvl_plugin.runtime.prompt_budget import PromptBudget
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Scheduler
from paddlemix_qwenvl_plugin.runtime.statistics import LoopStatistics
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, RequestError
from paddlemix_qwenvl_plugin.util.program import program


class NotFiniteError(RequestError):
    """Error for a request whose logits are not finite (NO_TOKEN); other requests are not affected."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite (infinity or NaN); its weights may be damaged: "
            f"check them with {program()} verify"
        )


class _Step(NamedTuple):
    """A started step; `start` is in seconds of time.perf_counter(), and `picked` waits for the result."""

    chunks: list[Chunk]
    start: float
    picked: Callable[[], Picked]


class Loop:
    """Continuous batching: requests join and leave between steps.

    The loop has no thread. A thread that waits for tokens runs steps, which advance all requests; if several threads
    wait, one runs a step and the others wait for its end. If the executor can compute ahead, a decode step of the same
    requests (`Scheduler.schedule_ahead`) is started before the tokens of the current step are read; if a request ends
    with the current step, its results of the next one are discarded.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._scheduler = Scheduler(executor.limits)
        self._images = ImageCache()
        self._lock = threading.Lock()  # guards everything except _submitted and _cancelled
        self._submitted: deque[Generation] = deque()
        self._cancelled: deque[Generation] = deque()
        self._started: _Step | None = None  # started ahead, not yet read
        self._step_end = 0.0  # end of the last step, seconds of time.perf_counter()
        self._prompt_budget = PromptBudget(executor.limits.step_tokens)
        self._counts: Counter[str] = Counter()  # counters of LoopStatistics

    def load(self, vision: bool) -> None:
        """Load the language stage and, with `vision`, the vision stage now rather than at their first use."""
        with self._lock:
            self._executor.load(vision)

    def submit(self, generation: Generation) -> None:
        """Queue a request; it can join the next step that is scheduled."""
        self._submitted.append(generation)

    def cancel(self, generation: Generation) -> None:
        """Cancel a request unless it has ended; its blocks are freed now, or at the next step if a step is running."""
        self._cancelled.append(generation)
        # Do not block: the garbage collector may call this within a step.
        if self._lock.acquire(blocking=False):
            try:
                self._take_queues()
            finally:
                self._lock.release()

    def advance(
        self, generation: Generation, n_seen: int, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Run steps until a request has more than `n_seen` tokens or has ended, or `stopping` returns true.

        Raises:
            QwenVLError: the request failed.
        """

        def waiting() -> bool:
            return len(generation.tokens) <= n_seen and not generation.finished

        while waiting() and not stopping():
            with self._lock:
                if waiting():
                    self._step()
        if generation.error is not None:
            raise generation.error

    def step(self) -> bool:
        """Run one step; return False if no request waits or runs."""
        with self._lock:
            self._take_queues()
            if self._scheduler.idle:
                self._started = None  # all requests of the started step have ended
                return False
            self._step()
            return True

    def encode(self, image: ImageInput) -> NDArray[np.float32]:
        """The features of an image, float32 [n_queries, hidden_size]: cached, or encoded now."""
        with self._lock:
            return self._encode(image)

    def check_device(self) -> None:
        """Raise an error if the device is unusable, such as a GPU after a fault."""
        with self._lock:
            self._executor.check_device()

    @property
    def statistics(self) -> LoopStatistics:
        """Gauges and counters, read without the lock: only the thread that runs the steps may call this."""
        scheduler = self._scheduler
        return LoopStatistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._submitted),
            blocks=scheduler.pool.n_blocks,
            blocks_used=scheduler.pool.n_blocks - scheduler.pool.n_free,
            prompt_tokens=scheduler.n_prompt_tokens,
            cached_tokens=scheduler.n_cached_tokens,
            preempted=scheduler.n_preempted,
            **self._counts,
        )

    def _take_queues(self) -> None:
        while self._submitted:
            self._scheduler.add(self._submitted.popleft())
        while self._cancelled:
            generation = self._cancelled.popleft()
            if not generation.finished:
                generation.finish_reason = "cancelled"
                self._drop(generation)

    def _step(self) -> None:
        self._take_queues()
        try:
            step, self._started = self._started, None
            if step is None:
                encoded = self._encode_next()
                if encoded and not self._scheduler.running and len(self._scheduler.waiting) == 1:
                    return  # there is no other request, and the reader of this one can stop it before the prefill
                step = self._start(self._scheduler.schedule())
            if step is not None:
                self._started = self._start(self._scheduler.schedule_ahead(step.chunks))
                self._finish(step)
        except BaseException:  # Ctrl-C or a defect
            # After an interrupted step, the executor's state is undefined.
            self._started = None
            for generation in self._scheduler.running:
                # The engine may have counted a token that was never added to the request.
                self._executor.forget(generation)
            self._scheduler.preempt_all()
            raise

    def _encode_next(self) -> bool:
        """Encode the next image that a request waits for; return False if there is none.

        One image per call, so that running requests have a step between two images.
        """
        next_image = self._scheduler.image_to_encode()
        if next_image is None:
            return False
        generation, image = next_image
        start = time.perf_counter()
        try:
            image.features = self._encode(image)
            image.pixels = None
        except QwenVLError as error:
            self._fail(generation, error)
        generation.encode_seconds += time.perf_counter() - start
        return True

    def _encode(self, image: ImageInput) -> NDArray[np.float32]:
        if image.features is not None:
            return image.features
        features = self._images.get(image.digest)
        if features is not None:
            self._counts["image_cache_hits"] += 1
            return features
        pixels = image.pixels
        assert pixels is not None
        features = self._executor.encode_image(normalise(pixels) if pixels.dtype == np.uint8 else pixels)
        self._images.put(image.digest, features)
        self._counts["images_encoded"] += 1
        return features

    def _start(self, chunks: list[Chunk]) -> _Step | None:
        if not chunks:
            return None
        start = time.perf_counter()
        try:
            return _Step(chunks, start, self._executor.start(chunks))
        except QwenVLError as error:
            self._fail_all(chunks, error)
            return None

    def _finish(self, step: _Step) -> None:
        try:
            tokens, logprobs = step.picked()
        except QwenVLError as error:
            self._fail_all(step.chunks, error)
            return
        picked = iter(zip(tokens, repeat(None) if logprobs is None else logprobs))
        self._counts["steps"] += 1
        end = time.perf_counter()
        # A step that was started ahead waits for the previous step.
        seconds = end - max(step.start, self._step_end)
        self._step_end = end
        n_prompt = n_decoding = 0
        for chunk in step.chunks:
            generation = chunk.generation
            token, logprob = next(picked) if chunk.picks else (None, None)
            if generation.finished:  # ended since this step was started
                continue
            if generation.tokens:
                generation.decode_seconds += seconds
            else:
                generation.prefill_seconds += seconds
            if generation.decoding:
                n_decoding += 1
            else:  # a prompt, or a preempted request that is recomputed
                n_prompt += chunk.n
            self._scheduler.done(chunk)
            if token is None:
                continue
            if token == NO_TOKEN:
                self._fail(generation, NotFiniteError())
                continue
            generation.take(token, logprob)
            self._counts["completion_tokens"] += 1
            if generation.finish_reason is not None:
                self._drop(generation)
        self._prompt_budget.learn(n_prompt, n_decoding, seconds)
        self._scheduler.prompt_budget = self._prompt_budget.tokens

    def _fail_all(self, chunks: list[Chunk], error: QwenVLError) -> None:
        """Fail the requests of a step; the other requests are not affected."""
        for chunk in chunks:
            if not chunk.generation.finished:
                self._fail(chunk.generation, error)

    def _fail(self, generation: Generation, error: QwenVLError) -> None:
        generation.error = error
        self._drop(generation)

    def _drop(self, generation: Generation) -> None:
        self._scheduler.remove(generation)
        self._executor.forget(generation)
