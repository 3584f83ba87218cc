"""Distribution of a step's prompt tokens over requests, on an executor that computes nothing."""

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


class Counting:
    """Picks token 1 for every request; `n_run` has the number of tokens of each step."""

    def __init__(self, n_blocks: int) -> None:
        self.limits = Limits(64, STEP_TOKENS, n_blocks, 32)
        self.n_run: list[int] = []

    def load(self, vision: bool) -> None:
        pass

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        return np.zeros([1, 1], np.float32)

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        self.n_run.append(sum(chunk.n for chunk in chunks))
        n = sum(chunk.picks for chunk in chunks)
        return lambda: Picked([1] * n)

    def forget(self, generation: Generation) -> None:
        pass


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """Loop whose steps take the maximum time that a prompt may delay others."""
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.prompt_budget._MIN_TOKENS", STEP_TOKENS)
    return Loop(Counting(4000))


_numbers = iter(range(2, 10**6))


def prompt_of(n: int, new: int = 1) -> Generation:
    """A request of n tokens that shares no beginning with another."""
    return Generation([next(_numbers)] * n, [], [], GenerationOptions(max_new_tokens=new))


def steps_until(loop: Loop, true: Callable[[], bool], most: int = 1000) -> int:
    for n in range(most):
        if true():
            return n
        loop.step()
    raise AssertionError(f"not within {most} steps")


@pytest.mark.parametrize("n_long", [1, 5])
def test_a_short_prompt_does_not_wait_for_long_ones(loop, n_long):
    for _ in range(n_long):
        loop.submit(prompt_of(8000))
    loop.step()
    short = prompt_of(40, 3)
    loop.submit(short)
    assert steps_until(loop, lambda: bool(short.tokens)) <= 2
    assert steps_until(loop, lambda: short.finished) == 2


def test_a_long_prompt_gets_half_beside_any_number_of_short_ones(loop):
    long = prompt_of(8000)
    loop.submit(long)
    loop.step()

    def more() -> bool:
        for _ in range(20):
            loop.submit(prompt_of(40))
        return bool(long.tokens)

    assert steps_until(loop, more) <= 2 * 8000 // STEP_TOKENS + 1


@pytest.mark.parametrize("n_blocks", [4000, 300])
def test_a_long_prompt_among_more_short_ones_than_can_run_gets_its_turn(loop, n_blocks):
    """Also if it needs most of the blocks, which short requests would otherwise keep taking."""
    loop = Loop(Counting(n_blocks))
    long = prompt_of(8000)

    def more() -> bool:
        for _ in range(10):
            loop.submit(prompt_of(50, 20))
        return bool(long.tokens)

    steps_until(loop, lambda: more() or loop.statistics.waiting > 40)
    loop.submit(long)
    assert steps_until(loop, more) < 400


def test_of_equal_prompts_the_first_come_first(loop):
    """Sequentially, which minimizes the mean time to the first token."""
    equal = [prompt_of(1000) for _ in range(8)]
    for generation in equal:
        loop.submit(generation)
    done = [steps_until(loop, lambda each=each: each.finished) for each in equal]
    assert sum(done) == 16
    assert max(done) <= 3


def test_no_token_of_a_step_is_left_over(loop):
    sizes = [3000, 7, 600, 512, 1, 4000, 90]
    for n in sizes:
        loop.submit(prompt_of(n))
    while loop.step():
        pass
    n_run = loop._executor.n_run
    assert n_run[:-1] == [STEP_TOKENS] * (sum(sizes) // STEP_TOKENS)
    assert sum(n_run) == sum(sizes)


def test_words_do_not_wait_for_the_images_of_others(loop):
    """One image is encoded per step; requests without images continue, and those with images keep their order."""
    pixels = [np.full([2, 2, 3], i, np.uint8) for i in range(16)]
    many = []
    for start in (0, 8):
        images = [ImageInput.of(each) for each in pixels[start : start + 8]]
        for place, image in enumerate(images):
            image.slots = 2 * place, 2 * place + 1
        many.append(Generation([5] * 20, images, [], GenerationOptions(max_new_tokens=1)))
        loop.submit(many[-1])
    words = prompt_of(40)
    loop.submit(words)
    assert steps_until(loop, lambda: words.finished) == 1
    assert loop.statistics.images_encoded == 1
    assert steps_until(loop, lambda: many[0].finished) == 7
    assert steps_until(loop, lambda: many[1].finished) == 9


@pytest.mark.parametrize(("decode_seconds", "expected"), [(0.0, 100), (0.05, 100), (0.3, 360)])
def test_prompts_take_three_times_as_long_as_decoding(monkeypatch, decode_seconds, expected):
    """At least 0.25 s: at 400 prompt tokens per second 100 tokens, with slow decoding 360."""
    executor = Counting(4000)
    loop = Loop(executor)
    now = [0.0]
    start = executor.start

    def slow(chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        now[0] += sum(chunk.n for chunk in chunks if not chunk.generation.tokens) / 400
        now[0] += decode_seconds if any(chunk.generation.tokens for chunk in chunks) else 0
        return start(chunks)

    monkeypatch.setattr(executor, "start", slow)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.loop.time.perf_counter", lambda: now[0])
    first = prompt_of(40, 100)
    loop.submit(first)
    steps_until(loop, lambda: len(first.tokens) == 3)
    loop.submit(prompt_of(3000))
    for _ in range(4):
        loop.step()
    assert expected - 2 <= executor.n_run[-1] - 1 <= expected
    assert len(first.tokens) == 7
