"""Distribution of a step's prompt tokens over the requests, with an executor that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.executor import Picked
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits

STEP_TOKENS = 512


class CountingExecutor:
    """Executor that picks token 1 for every request; `step_sizes` lists the number of tokens of each step."""

    def __init__(self, n_blocks: int) -> None:
        self.limits = Limits(max_running=64, step_tokens=STEP_TOKENS, n_blocks=n_blocks, block_tokens=32)
        self.step_sizes: list[int] = []

    def load(self, vision: bool) -> None:
        pass

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.zeros([1, 1], np.float32)

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        self.step_sizes.append(sum(chunk.n for chunk in chunks))
        n = sum(chunk.picks for chunk in chunks)
        return lambda: Picked([1] * n)

    def forget(self, generation: Generation) -> None:
        pass


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """Loop whose steps may have STEP_TOKENS prompt tokens, however long the steps take."""
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.prompt_budget._MIN_TOKENS", STEP_TOKENS)
    return Loop(CountingExecutor(4000))


_unused_ids = iter(range(2, 10**6))


def make_request(n_prompt: int, max_new_tokens: int = 1) -> Generation:
    """Request with a prompt of n_prompt tokens that has no prefix in common with another request."""
    return Generation(
        [next(_unused_ids)] * n_prompt, [], [], GenerationOptions(max_new_tokens=max_new_tokens)
    )


def steps_until(loop: Loop, condition: Callable[[], bool]) -> int:
    """Run steps until a condition holds, and return their number."""
    for n_steps in range(1000):
        if condition():
            return n_steps
        loop.step()
    raise AssertionError("not within 1000 steps")


@pytest.mark.parametrize("n_long", [1, 5])
def test_short_prompt_does_not_wait_for_long_prompts(loop, n_long):
    for _ in range(n_long):
        loop.submit(make_request(8000))
    loop.step()
    short = make_request(40, 3)
    loop.submit(short)
    assert steps_until(loop, lambda: bool(short.tokens)) <= 2
    assert steps_until(loop, lambda: short.finished) == 2


def test_long_prompt_gets_at_least_half_of_the_tokens(loop):
    """With 20 short prompts before each step, the long prompt takes at most about twice as many steps as alone."""
    long_request = make_request(8000)
    loop.submit(long_request)
    loop.step()

    def long_started_while_short_ones_arrive() -> bool:
        for _ in range(20):
            loop.submit(make_request(40))
        return bool(long_request.tokens)

    assert steps_until(loop, long_started_while_short_ones_arrive) <= 2 * 8000 // STEP_TOKENS + 1


@pytest.mark.parametrize("n_blocks", [4000, 300])
def test_long_prompt_starts_though_more_short_requests_arrive_than_can_run(loop, n_blocks):
    """Of 300 blocks the long prompt needs 250, so short requests must not get all blocks that become free."""
    loop = Loop(CountingExecutor(n_blocks))  # of the fixture, only the changed _MIN_TOKENS is used
    long_request = make_request(8000)

    def long_started_while_short_ones_arrive() -> bool:
        for _ in range(10):
            loop.submit(make_request(50, 20))
        return bool(long_request.tokens)

    def queue_is_long() -> bool:
        long_started_while_short_ones_arrive()
        return loop.statistics.waiting > 40

    steps_until(loop, queue_is_long)
    loop.submit(long_request)
    assert steps_until(loop, long_started_while_short_ones_arrive) < 400


def test_prompts_of_equal_length_are_computed_in_order_of_arrival(loop):
    """One after the other, which minimizes the mean time to the first token."""
    requests = [make_request(1000) for _ in range(8)]
    for request in requests:
        loop.submit(request)
    n_steps = [steps_until(loop, lambda request=request: request.finished) for request in requests]
    assert sum(n_steps) == 16  # 8000 tokens, 512 per step, rounded up
    assert max(n_steps) <= 3


def test_all_steps_but_the_last_are_full(loop):
    prompt_lengths = [3000, 7, 600, 512, 1, 4000, 90]
    for length in prompt_lengths:
        loop.submit(make_request(length))
    while loop.step():
        pass
    step_sizes = loop._executor.step_sizes
    assert step_sizes[:-1] == [STEP_TOKENS] * (sum(prompt_lengths) // STEP_TOKENS)
    assert sum(step_sizes) == sum(prompt_lengths)


def test_request_without_images_does_not_wait_for_images_of_others(loop):
    """One image is encoded per step. Requests with images are computed in order of arrival."""
    pixels = [np.full([2, 2, 3], i, np.uint8) for i in range(16)]
    with_images = []
    for start in (0, 8):
        images = [ImageInput.of(image) for image in pixels[start : start + 8]]
        for i, image in enumerate(images):
            image.slots = 2 * i, 2 * i + 1
        with_images.append(Generation([5] * 20, images, [], GenerationOptions(max_new_tokens=1)))
        loop.submit(with_images[-1])
    text_only = make_request(40)
    loop.submit(text_only)
    assert steps_until(loop, lambda: text_only.finished) == 1
    assert loop.statistics.images_encoded == 1
    assert steps_until(loop, lambda: with_images[0].finished) == 7
    # 9, not 8: a request that is alone begins its prefill in the step after its last image.
    assert steps_until(loop, lambda: with_images[1].finished) == 9


@pytest.mark.parametrize(("decode_seconds", "expected"), [(0.0, 100), (0.05, 100), (0.3, 360)])
def test_prompt_tokens_of_a_step_take_three_times_as_long_as_its_decoding(
    monkeypatch, decode_seconds, expected
):
    """They take at least 0.25 s: 100 tokens at 400 prompt tokens per second; with 0.3 s of decoding, 360 tokens."""
    executor = CountingExecutor(4000)
    loop = Loop(executor)
    now = [0.0]
    start = executor.start

    def start_with_clock(chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        now[0] += sum(chunk.n for chunk in chunks if not chunk.generation.tokens) / 400
        now[0] += decode_seconds if any(chunk.generation.tokens for chunk in chunks) else 0
        return start(chunks)

    monkeypatch.setattr(executor, "start", start_with_clock)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.loop.time.perf_counter", lambda: now[0])
    first = make_request(40, 100)
    loop.submit(first)
    steps_until(loop, lambda: len(first.tokens) == 3)
    loop.submit(make_request(3000))
    for _ in range(4):
        loop.step()
    n_prompt_tokens = executor.step_sizes[-1] - 1  # the first request has one token in each step
    assert expected - 2 <= n_prompt_tokens <= expected
    assert len(first.tokens) == 7
