"""The loop on a fake executor: completions of random requests, compared with those computed one by one."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.runtime.executor import NO_TOKEN, Picked
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits, Scheduler

STOP = 5


def next_token(inputs: Sequence[Any]) -> int:
    """The fake model: a token that depends on all inputs before it."""
    return zlib.crc32(repr(list(inputs)).encode()) % 16


def inputs_of(generation: Generation, tokens: Sequence[int]) -> list[Any]:
    """The model's input at each position of a request: (token, whether generated) or (image digest, image slot)."""
    inputs: list[Any] = [(token, False) for token in generation.prompt]
    for start, end in generation._generated:
        inputs[start:end] = [(token, True) for token, _ in inputs[start:end]]
    for image in generation.images:
        start, end = image.slots
        inputs[start:end] = [(image.digest, slot) for slot in range(end - start)]
    return [*inputs, *((token, True) for token in tokens)]


def completion(generation: Generation) -> list[int]:
    """The completion of a request, computed without the loop."""
    tokens: list[int] = []
    while len(tokens) < generation.options.max_new_tokens and (not tokens or tokens[-1] != STOP):
        tokens.append(next_token(inputs_of(generation, tokens)))
    return tokens


class FakeExecutor:
    """Executor with the inputs themselves in the KV cache; it computes a token from the inputs in the request's blocks.

    Checks that each step is within the limits, contains all decoding requests, and does not write to shared blocks.

    Attributes:
        memory: input at each (block, position in the block).
        computed: number of computed tokens of each request.
        n_encoded: number of encoded images.
        n_preempted: how often a request continued at an earlier position than it had reached.
        n_found: number of requests that began with cached blocks.
        n_ahead: number of chunks that were started before the request had received its previous token.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.memory: dict[tuple[int, int], Any] = {}
        self.loop: Any = None
        self.n_encoded = self.n_preempted = self.n_found = self.n_ahead = 0
        self.picked: list[int] = []  # by the last step
        self.computed: dict[Generation, int] = {}

    def load(self, vision: bool) -> None:
        pass

    def encode_image(self, pixels: np.ndarray) -> np.ndarray:
        self.n_encoded += 1
        return pixels[0, :1]

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        scheduler = self.loop._scheduler
        assert len(chunks) <= self.limits.max_running
        assert sum(chunk.n for chunk in chunks) <= self.limits.step_tokens
        running = {chunk.generation for chunk in chunks}
        assert len(running) == len(chunks)
        assert all(generation in running for generation in scheduler.running if generation.decoding)
        picked = []
        for chunk in chunks:
            generation = chunk.generation
            if chunk.ahead:
                # The previous step, whose chunks have the same order, has picked a token that `generation` lacks.
                n_past = generation.n_total
                tokens = [*generation.tokens, self.picked[len(picked)]]
            else:
                n_past = generation.n_computed
                tokens = generation.tokens
            n_total = len(generation.prompt) + len(tokens)
            self.n_ahead += chunk.ahead
            if n_past < self.computed.get(generation, 0):
                self.n_preempted += 1
            elif generation not in self.computed:
                self.n_found += n_past > 0
            assert (n_past + chunk.n == n_total) == chunk.picks
            inputs = inputs_of(generation, tokens)
            for position in range(n_past, n_past + chunk.n):
                block, offset = self._address(generation, position)
                assert scheduler.pool._users[block] == 1
                self.memory[block, offset] = inputs[position]
            self.computed[generation] = n_past + chunk.n
            if chunk.picks:
                picked.append(next_token([self.memory[self._address(generation, i)] for i in range(n_total)]))
        self.picked = picked
        return lambda: Picked(picked)

    def forget(self, generation: Generation) -> None:
        pass

    def _address(self, generation: Generation, position: int) -> tuple[int, int]:
        """The block and the position in the block."""
        return generation.blocks[position // self.limits.block_tokens], position % self.limits.block_tokens


def open_loop(limits: Limits) -> tuple[Loop, FakeExecutor]:
    executor = FakeExecutor(limits)
    loop = executor.loop = Loop(executor)
    return loop, executor


def random_request(rng: random.Random, context: int) -> Generation:
    """A random request; many share prefixes of their prompts, and some have images and earlier answers."""
    prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 4))] * rng.randrange(1, 6)
    images, generated = [], []
    if rng.random() < 0.4:
        for _ in range(rng.randrange(1, 3)):
            start = len(prompt)
            prompt += [9] * 6  # image slots
            pixels = np.full([1, 2, 2], rng.randrange(3), np.float32)
            image = ImageInput.of(pixels)
            image.slots = start, start + 6
            images.append(image)
            prompt += [rng.randrange(3)]
    if rng.random() < 0.3:
        start = len(prompt)
        prompt += [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        generated.append((start, len(prompt)))
    prompt += [rng.randrange(2) for _ in range(rng.randrange(1, 4))]
    room = context - len(prompt)
    options = GenerationOptions(max_new_tokens=rng.randrange(1, min(room, 24) + 1))
    # The last argument is the rotary class, which stands for a rotary base: only requests of the same class share
    # blocks.
    return Generation(prompt, images, [STOP], options, generated, rng.randrange(2))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    block_tokens=st.sampled_from([1, 3, 4, 8]),
    n_spare_blocks=st.integers(0, 30),
    max_running=st.integers(1, 9),
    step_tokens=st.sampled_from([9, 12, 32]),
    ahead=st.booleans(),
)
def test_completions_equal_those_without_the_loop(
    seed, block_tokens, n_spare_blocks, max_running, step_tokens, ahead
):
    context = 96
    n_blocks = -(-context // block_tokens) + n_spare_blocks
    limits = Limits(max_running, step_tokens, n_blocks, block_tokens, ahead=ahead)
    check(random.Random(seed), limits, context, n_requests=30)


def check(rng: random.Random, limits: Limits, context: int, n_requests: int) -> FakeExecutor:
    """Run random requests that join at random and are cancelled at random; compare their completions."""
    loop, executor = open_loop(limits)
    requests, cancelled, active = [], set(), []
    while len(requests) < n_requests or active:
        if len(requests) < n_requests and rng.random() < 0.5:
            generation = random_request(rng, context)
            requests.append(generation)
            active.append(generation)
            loop.submit(generation)
        if active and rng.random() < 0.03:
            generation = rng.choice(active)
            loop.cancel(generation)
            cancelled.add(generation)
        loop.step()
        active = [generation for generation in active if not generation.finished]
    for generation in requests:
        tokens = completion(generation)
        if generation.finish_reason == "cancelled":
            assert generation in cancelled
            assert generation.tokens == tokens[: len(generation.tokens)]
        else:
            assert generation.tokens == tokens
            assert generation.finish_reason == ("stop" if tokens[-1] == STOP else "length")
    assert loop._scheduler.idle
    assert loop._scheduler.pool.n_free == limits.n_blocks
    return executor


@pytest.mark.parametrize("ahead", [False, True])
def test_soak(ahead):
    """10,000 requests, of which some are preempted and some begin with cached blocks; equal images are encoded once."""
    limits = Limits(max_running=9, step_tokens=32, n_blocks=26, block_tokens=4, ahead=ahead)
    executor = check(random.Random(1), limits, context=96, n_requests=10_000)
    assert (executor.n_ahead > 1000) == ahead
    assert executor.n_preempted > 100
    assert executor.n_found > 1000
    assert executor.n_encoded == 3


def test_a_long_prompt_does_not_stall_a_decoding_request():
    loop, executor = open_loop(Limits(max_running=4, step_tokens=64, n_blocks=64, block_tokens=8))
    loop._prompt_budget.tokens = 16
    first = Generation([1, 2], [], [], GenerationOptions(max_new_tokens=20))
    loop.submit(first)
    loop.step()
    loop.submit(Generation([3] * 160, [], [], GenerationOptions(max_new_tokens=1)))
    for n in range(2, 11):
        loop.step()
        assert len(first.tokens) == n
    assert executor.computed[first] == 2 + 9  # the prompt, and all generated tokens but the last


def test_a_short_prompt_does_not_overtake_one_that_waits_for_blocks():
    """Not even while a running prompt uses up the budget of the oldest prompts: the long one could wait forever."""
    scheduler = Scheduler(Limits(max_running=4, step_tokens=8, n_blocks=20, block_tokens=8))
    running, long, short = (
        Generation([i] * n, [], [], GenerationOptions(max_new_tokens=1)) for i, n in enumerate((96, 80, 8))
    )
    for generation in (running, long, short):
        scheduler.add(generation)
    while running.n_computed < len(running.prompt):
        for chunk in scheduler.schedule():
            scheduler.done(chunk)
        assert scheduler.running == [running]
    scheduler.remove(running)
    scheduler.schedule()
    assert scheduler.running == [long, short]


def test_recomputed_tokens_count_as_prompt_tokens(monkeypatch):
    """Steps that recompute a preempted request do not count as decode steps, although they recompute generated tokens.

    From decode steps, the budget of prompt tokens learns the time of a row.
    """
    limits = Limits(max_running=4, step_tokens=16, n_blocks=64, block_tokens=8, prefix_cache=False)
    loop, _ = open_loop(limits)
    counts = []  # (prompt tokens, decoding requests) of each step
    monkeypatch.setattr(
        loop._prompt_budget, "learn", lambda n_prompt, n_decoding, _: counts.append((n_prompt, n_decoding))
    )
    generation = Generation([1] * 20, [], [], GenerationOptions(max_new_tokens=20))
    loop.submit(generation)
    for _ in range(4):
        loop.step()
    loop._scheduler.preempt_all()
    for _ in range(3):
        loop.step()
    # The prompt in chunks of 16 and 4, two decode steps; the prompt and 3 tokens in chunks of 16 and 7, a decode step.
    assert counts == [(16, 0), (4, 0), (0, 1), (0, 1), (16, 0), (7, 0), (0, 1)]


def test_cancelling_frees_blocks_at_once():
    loop, _ = open_loop(Limits(max_running=4, step_tokens=64, n_blocks=64, block_tokens=8))
    generation = Generation([1] * 100, [], [], GenerationOptions(max_new_tokens=20))
    loop.submit(generation)
    loop.step()
    assert loop._scheduler.pool.n_free < 64
    loop.cancel(generation)
    assert loop._scheduler.pool.n_free == 64
    assert (generation.finish_reason, loop.step()) == ("cancelled", False)


def test_a_failed_step_ends_only_its_requests(monkeypatch):
    # One running request: the second one is not in the failed step.
    loop, executor = open_loop(Limits(max_running=1, step_tokens=64, n_blocks=64, block_tokens=8))
    options = GenerationOptions(max_new_tokens=3)
    first, second = (Generation([n, 1, 1], [], [STOP], options) for n in (1, 2))
    loop.submit(first)
    loop.submit(second)

    def fail(chunks):
        raise QwenVLError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "start", fail)
        with pytest.raises(QwenVLError, match="out of memory"):
            loop.advance(first, 0)
    loop.advance(second, len(completion(second)) - 1)
    assert second.tokens == completion(second)


def test_an_interrupted_step_is_computed_again(monkeypatch):
    """After an interruption, as by Ctrl-C, no result of the interrupted step is used."""
    loop, executor = open_loop(Limits(max_running=4, step_tokens=64, n_blocks=64, block_tokens=8))
    generation = Generation([1] * 21, [], [STOP], GenerationOptions(max_new_tokens=9))
    assert len(completion(generation)) > 2
    loop.submit(generation)
    loop.advance(generation, 1)
    start = executor.start

    def interrupted(chunks):
        start(chunks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.advance(generation, 2)
    while not generation.finished:
        loop.advance(generation, len(generation.tokens))
    assert generation.tokens == completion(generation)


def test_logits_that_are_not_finite_end_the_request(monkeypatch):
    loop, executor = open_loop(Limits(max_running=4, step_tokens=64, n_blocks=64, block_tokens=8))
    generation = Generation([1, 2], [], [], GenerationOptions())
    loop.submit(generation)
    monkeypatch.setattr(executor, "start", lambda chunks: lambda: Picked([NO_TOKEN]))
    with pytest.raises(QwenVLError, match="not finite"):
        loop.advance(generation, 0)
    assert loop._scheduler.idle


def test_requests_of_several_threads():
    loop, _ = open_loop(Limits(max_running=9, step_tokens=32, n_blocks=40, block_tokens=4))
    rng = random.Random(3)
    requests = [[random_request(rng, 96) for _ in range(40)] for _ in range(6)]
    errors = []

    def run(generations):
        try:
            for generation in generations:
                loop.submit(generation)
                while not generation.finished:
                    loop.advance(generation, len(generation.tokens))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(generations,)) for generations in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for generations in requests:
        for generation in generations:
            assert generation.tokens == completion(generation)
