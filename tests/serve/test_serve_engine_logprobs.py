"""Log probabilities against a float64 log softmax of the logits, in any batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import pytest
from engines import DEVICE, needs_compiler, open_model
from executors import without_cache
from serve_engine_helpers import RequestCase

from paddlemix_qwenvl_plugin import GenerationOptions, QwenVL
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.generation import Generation, ImageInput
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk
from paddlemix_qwenvl_plugin.serve.engine_api import EngineRequest

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def vl(local_model: QwenVL) -> QwenVL:
    return local_model


class KeepsLogits(EngineExecutor):
    """Executor that records the engine's logits of each step: float32 [vocab_size] per token."""

    def __init__(self, vl: QwenVL, n_blocks: Optional[int] = None, ahead: bool = False) -> None:
        super().__init__(*vl._stages, n_blocks=n_blocks, ahead=ahead)
        self._logits = np.empty([256, vl.config.vocab_size], np.float32)
        self._args.logits = self._logits.ctypes.data
        self.kept: dict[Generation, list[np.ndarray]] = {}

    def start(self, chunks: Sequence[Chunk]) -> Any:
        picked = super().start(chunks)
        picking = [chunk for chunk in chunks if chunk.picks]
        for row, chunk in zip(self._logits, picking):
            # A step that is thrown away leaves one too many, which the next one for the same token replaces.
            n = len(chunk.generation.tokens) + chunk.ahead
            self.kept[chunk.generation] = [*self.kept.get(chunk.generation, [])[:n], row.copy()]
        return picked


def generation_of(vl: QwenVL, asked: RequestCase, n_logprobs: Optional[int]) -> Generation:
    request = asked.request
    images = [ImageInput.of(image) for image in request.images]
    return vl.generation(
        request.prompt, images, request.stop_token_ids, request.options, request.generated, n_logprobs
    )


def run(loop: Loop, generations: Sequence[Generation]) -> None:
    for generation in generations:
        loop.submit(generation)
    while loop.step():
        pass


def check(generation: Generation, logits: Sequence[np.ndarray]) -> None:
    """Check the log probabilities of each token."""
    assert len(generation.logprobs) == len(generation.tokens) > 0
    for token, (logprob, top), row in zip(generation.tokens, generation.logprobs, logits):
        exact = row.astype(np.float64)
        exact -= exact.max()
        exact -= np.log(np.exp(exact).sum())
        assert abs(logprob - exact[token]) < 1e-5
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[: generation.n_logprobs]
        assert [i for i, _ in top] == order
        np.testing.assert_allclose([each for _, each in top], exact[order], atol=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
def test_of_every_kind_of_request(vl, ahead):
    """Greedy and sampled, with images and penalties, beside requests with other values of n_logprobs."""
    rng = random.Random(3)
    executor = KeepsLogits(vl, ahead=ahead)
    numbers = [None, 0, 1, 5, 20]
    generations = [generation_of(vl, RequestCase.random(vl, rng), numbers[i % 5]) for i in range(30)]
    run(Loop(executor), generations)
    assert sum(generation.options.greedy for generation in generations) > 3
    for generation in generations:
        if generation.n_logprobs is None:
            assert generation.logprobs == []
        else:
            check(generation, executor.kept[generation])
    sampled = [each for each in generations if each.n_logprobs and not each.options.greedy]
    assert any(
        token != logprobs.top[0][0] for each in sampled for token, logprobs in zip(each.tokens, each.logprobs)
    )


def test_after_a_preemption(vl):
    """Each token's log probabilities appear once and are bitwise those of the request alone."""
    rng = random.Random(1)
    asked = []
    for seed in range(12):
        sampled = {"temperature": 1.3, "seed": seed} if seed % 2 else {}
        options = GenerationOptions(max_new_tokens=90, repetition_penalty=1.1, **sampled)
        prompt = [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
        asked.append(RequestCase(EngineRequest(prompt, [], [], options)))
    alone = []
    for each in asked:
        alone.append(generation_of(vl, each, 4))
        run(without_cache(vl), [alone[-1]])
    n_blocks = vl.config.max_position_embeddings // 32
    executor = KeepsLogits(vl, n_blocks)
    loop = Loop(executor)
    for _ in range(n_blocks - 8):  # held by no request
        loop._scheduler.pool.allocate()
    together = [generation_of(vl, each, 4) for each in asked]
    run(loop, together)
    assert loop.statistics.preempted > 3
    for generation, wanted in zip(together, alone):
        check(generation, executor.kept[generation])
        assert (generation.tokens, generation.logprobs) == (wanted.tokens, wanted.logprobs)


def test_with_steps_ahead_as_without(stages):
    """Also on a GPU (QWENVL_TEST_DEVICE): a step's results are read before the next step overwrites them."""
    vl = QwenVL.from_exported(*stages, device=DEVICE)
    answers = []
    for ahead in (False, True):
        rng = random.Random(8)
        loop = Loop(EngineExecutor(*vl._stages, ahead=ahead, gpu_memory=0.1))
        generations = [
            generation_of(vl, RequestCase.random(vl, rng), rng.choice([None, 0, 3])) for _ in range(20)
        ]
        run(loop, generations)
        for generation in generations:
            for token, (logprob, top) in zip(generation.tokens, generation.logprobs):
                assert len(top) == generation.n_logprobs
                assert not top or not generation.options.greedy or (token, logprob) == top[0]
                assert sum(np.exp(p) for _, p in top) < 1 + 1e-5
                assert logprob <= max([p for _, p in top], default=0)
        answers.append([(each.tokens, each.logprobs) for each in generations])
    assert answers[0] == answers[1]
    assert sum(len(logprobs) for _, logprobs in answers[0]) > 50


def test_of_the_portable_graph(vl, stages):
    """Equal to the engine's up to rounding."""
    portable = open_model(*stages, "portable")
    for options in ({}, {"temperature": 1.5, "seed": 5}):
        both = []
        for pair in (vl, portable):
            chosen = GenerationOptions(max_new_tokens=12, **options)
            both.append(pair.generation([10, 20, 30], [], [], chosen, n_logprobs=3))
            run(pair.open_loop(), [both[-1]])
        engine, graph = both
        assert engine.tokens == graph.tokens
        assert len(graph.logprobs) == 12
        for (ours, our_top), (theirs, their_top) in zip(engine.logprobs, graph.logprobs):
            assert abs(ours - theirs) < 1e-3
            assert [token for token, _ in our_top] == [token for token, _ in their_top]
            np.testing.assert_allclose([p for _, p in our_top], [p for _, p in their_top], atol=1e-3)
