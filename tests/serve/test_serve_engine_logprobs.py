"""Log probabilities, compared with a float64 log softmax of the logits, in mixed batches and after preemptions."""

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


class LogitsRecorder(EngineExecutor):
    """Executor that records logits: `logits` maps a generation to one float32 [vocab_size] per generated token.

    For a CPU only: there, a step has been computed when the base class's `start` returns, even with `ahead`, with which
    a step starts before the tokens of the previous one are read.
    """

    def __init__(self, vl: QwenVL, n_blocks: Optional[int] = None, ahead: bool = False) -> None:
        super().__init__(*vl._stages, n_blocks=n_blocks, ahead=ahead)
        # A row for each token that a step picks; the tests have at most 30 requests at a time.
        self._step_logits = np.empty([256, vl.config.vocab_size], np.float32)
        self._args.logits = self._step_logits.ctypes.data
        self.logits: dict[Generation, list[np.ndarray]] = {}

    def start(self, chunks: Sequence[Chunk]) -> Any:
        picked = super().start(chunks)
        picking = [chunk for chunk in chunks if chunk.picks]
        for row, chunk in zip(self._step_logits, picking):
            # The row is for the token with this index. If a step ahead was discarded, its row is replaced here.
            index = len(chunk.generation.tokens) + chunk.ahead
            self.logits[chunk.generation] = [*self.logits.get(chunk.generation, [])[:index], row.copy()]
        return picked


def generation_of(vl: QwenVL, case: RequestCase, n_logprobs: Optional[int]) -> Generation:
    request = case.request
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
    """Compare the log probabilities of each token with those from the logits of its step."""
    assert len(generation.logprobs) == len(generation.tokens) > 0
    for token, (logprob, top), row in zip(generation.tokens, generation.logprobs, logits):
        expected = row.astype(np.float64)
        expected -= expected.max()
        expected -= np.log(np.exp(expected).sum())
        assert abs(logprob - expected[token]) < 1e-5
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[: generation.n_logprobs]
        assert [top_token for top_token, _ in top] == order
        np.testing.assert_allclose([top_logprob for _, top_logprob in top], expected[order], atol=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
def test_random_requests(vl, ahead):
    """Greedy and sampled, with images and penalties, in batches with different values of n_logprobs."""
    rng = random.Random(3)
    executor = LogitsRecorder(vl, ahead=ahead)
    n_logprobs = [None, 0, 1, 5, 20]
    generations = [generation_of(vl, RequestCase.make_random(vl, rng), n_logprobs[i % 5]) for i in range(30)]
    run(Loop(executor), generations)
    assert sum(generation.options.greedy for generation in generations) > 3
    for generation in generations:
        if generation.n_logprobs is None:
            assert generation.logprobs == []
        else:
            check(generation, executor.logits[generation])
    # Some sampled token is not the most likely one.
    sampled = [
        generation for generation in generations if generation.n_logprobs and not generation.options.greedy
    ]
    assert any(
        token != logprobs.top[0][0]
        for generation in sampled
        for token, logprobs in zip(generation.tokens, generation.logprobs)
    )


def test_after_a_preemption(vl):
    """Tokens and log probabilities are exactly those of the same requests computed alone."""
    rng = random.Random(1)
    cases = []
    for seed in range(12):
        sampled = {"temperature": 1.3, "seed": seed} if seed % 2 else {}
        options = GenerationOptions(max_new_tokens=90, repetition_penalty=1.1, **sampled)
        prompt = [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
        cases.append(RequestCase(EngineRequest(prompt, [], [], options)))
    computed_alone = []
    for case in cases:
        computed_alone.append(generation_of(vl, case, 4))
        run(without_cache(vl), [computed_alone[-1]])
    n_blocks = vl.config.max_position_embeddings // 32
    executor = LogitsRecorder(vl, n_blocks)
    loop = Loop(executor)
    # With only 8 free blocks, requests are preempted.
    for _ in range(n_blocks - 8):
        loop._scheduler.pool.allocate()
    generations = [generation_of(vl, case, 4) for case in cases]
    run(loop, generations)
    assert loop.statistics.preempted > 3
    for generation, expected in zip(generations, computed_alone):
        check(generation, executor.logits[generation])
        assert (generation.tokens, generation.logprobs) == (expected.tokens, expected.logprobs)


def test_steps_ahead_change_nothing(stages):
    """If a step starts during the previous one, the results of a step must be read before a later one overwrites them.

    QWENVL_TEST_DEVICE selects the device, for example a GPU.
    """
    vl = QwenVL.from_exported(*stages, device=DEVICE)
    results = []
    for ahead in (False, True):
        rng = random.Random(8)
        loop = Loop(EngineExecutor(*vl._stages, ahead=ahead, gpu_memory=0.1))
        generations = [
            generation_of(vl, RequestCase.make_random(vl, rng), rng.choice([None, 0, 3])) for _ in range(20)
        ]
        run(loop, generations)
        for generation in generations:
            for token, (logprob, top) in zip(generation.tokens, generation.logprobs):
                assert len(top) == generation.n_logprobs
                top_logprobs = [top_logprob for _, top_logprob in top]
                if top and generation.options.greedy:
                    assert (token, logprob) == top[0]
                assert sum(map(np.exp, top_logprobs)) < 1 + 1e-5
                assert logprob <= max(top_logprobs, default=0)
        results.append([(generation.tokens, generation.logprobs) for generation in generations])
    assert results[0] == results[1]
    assert sum(len(logprobs) for _, logprobs in results[0]) > 50


def test_portable_graph_and_engine_agree_up_to_rounding(vl, stages):
    portable = open_model(*stages, "portable")
    for options in ({}, {"temperature": 1.5, "seed": 5}):
        generations = []
        for model in (vl, portable):
            generation_options = GenerationOptions(max_new_tokens=12, **options)
            generations.append(model.generation([10, 20, 30], [], [], generation_options, n_logprobs=3))
            run(model.open_loop(), [generations[-1]])
        engine, graph = generations
        assert engine.tokens == graph.tokens
        assert len(graph.logprobs) == 12
        for (engine_logprob, engine_top), (graph_logprob, graph_top) in zip(engine.logprobs, graph.logprobs):
            assert abs(engine_logprob - graph_logprob) < 1e-3
            engine_tokens, engine_values = zip(*engine_top)
            graph_tokens, graph_values = zip(*graph_top)
            assert engine_tokens == graph_tokens
            np.testing.assert_allclose(engine_values, graph_values, atol=1e-3)
