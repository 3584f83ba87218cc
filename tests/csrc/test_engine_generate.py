"""qvl_generate: batches, stop tokens, callbacks, block pools.

The tests also run on a GPU (tests/cuda/README.md).
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engine import (
    FINISH_END,
    FINISH_LENGTH,
    FLOAT32,
    INTERNAL,
    INVALID,
    LANGUAGE,
    STOPPED,
    Engine,
    EngineError,
    OnStep,
    Request,
    Result,
    make_config,
    pointer,
    store,
)

RANDOM = np.random.default_rng(8)
PROMPTS = [RANDOM.integers(0, 600, n).tolist() for n in (1, 40, 7, 150)]


@pytest.fixture(scope="module")
def engine(library, golden_model):
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE, max_tokens=64)  # prompts take several passes
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        yield engine


def completions_alone(engine, **options):
    """Ten tokens for each prompt, each generated in a batch of one request."""
    return [engine.generate([prompt], 10, **options)[0][0] for prompt in PROMPTS]


def test_a_batch_gives_the_same_as_its_requests_alone(engine):
    assert engine.generate(PROMPTS, 10) == (completions_alone(engine), [FINISH_LENGTH] * 4)
    sampling = {"temperature": 3.0, "seed": 4}
    tokens, _ = engine.generate(PROMPTS, 10, **sampling)
    assert tokens == completions_alone(engine, **sampling)
    assert tokens != completions_alone(engine)


def test_stop_tokens(engine):
    """A request ends after its first stop token, but not before min_new tokens."""
    completions = completions_alone(engine)
    stop_tokens = [completions[0][2], completions[3][4]]
    tokens, finish_reasons = engine.generate(PROMPTS, 10, end_ids=stop_tokens)
    for row, completion, finish_reason in zip(tokens, completions, finish_reasons):
        stops = [i for i, token in enumerate(completion) if token in stop_tokens]
        assert row == (completion[: stops[0] + 1] if stops else completion)
        assert finish_reason == (FINISH_END if stops else FINISH_LENGTH)
    tokens, _ = engine.generate(PROMPTS, 10, end_ids=stop_tokens, min_new=6)
    assert not any(token in stop_tokens for row in tokens for token in row[:6])


def test_penalties(engine):
    without_penalty, _ = engine.generate(PROMPTS, 30)
    penalized, _ = engine.generate(PROMPTS, 30, presence_penalty=100.0)
    assert all(len(set(row)) == 30 for row in penalized)
    assert any(len(set(row)) < 30 for row in without_penalty)


def test_the_callback_gets_every_step(engine):
    tokens_by_request: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    steps = []

    def on_step(step, requests, tokens):
        steps.append(step)
        for request, token in zip(requests, tokens):
            tokens_by_request[request].append(token)
        return 0

    stop_token = completions_alone(engine)[1][3]
    tokens, _ = engine.generate(PROMPTS, 10, end_ids=[stop_token], on_step=on_step)
    assert steps == list(range(len(steps)))
    assert list(tokens_by_request.values()) == tokens


def test_the_callback_stops_generation(engine):
    with pytest.raises(EngineError, match="after step 2") as error:
        engine.generate(PROMPTS, 10, on_step=lambda step, requests, tokens: step == 2)
    assert error.value.status == STOPPED
    assert engine.generate(PROMPTS, 10)[0] == completions_alone(engine)


def test_logits_that_are_not_finite(engine):
    """An error in place of arbitrary tokens, as when values of the model overflow; the engine works afterwards."""
    features = np.full([2, engine.config.hidden], np.nan, np.float32)
    line = r"requests\[1\]: the logits of token 0 are not finite"
    with pytest.raises(EngineError, match=line) as error:
        engine.generate(PROMPTS[:2], 3, spans=[[], [(5, features)]])
    assert error.value.status == INTERNAL
    assert engine.generate(PROMPTS, 10)[0] == completions_alone(engine)


@pytest.mark.parametrize("block_tokens", [1, 7, 256])
def test_a_pool_of_the_caller(engine, block_tokens):
    n_blocks = sum(-(-(len(prompt) + 10) // block_tokens) for prompt in PROMPTS)
    with engine.pool(n_blocks, block_tokens) as pool:
        for _ in range(2):
            assert engine.generate(PROMPTS, 10, pool=pool)[0] == completions_alone(engine)
    line = f"has {n_blocks - 1} blocks; these requests need {n_blocks}"
    with engine.pool(n_blocks - 1, block_tokens) as pool, pytest.raises(EngineError, match=line):
        engine.generate(PROMPTS, 10, pool=pool)


def test_a_pool_of_another_engine(engine, library, golden_model):
    model = golden_model("b")
    config = make_config(model.config, LANGUAGE)
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as other:
        with other.pool(4) as pool, pytest.raises(EngineError, match="belongs to another engine") as error:
            engine.generate([[1, 2]], 3, pool=pool)
        assert error.value.status == INVALID


@pytest.mark.parametrize(
    ("prompts", "max_new", "message"),
    [
        ([[5], []], 3, r"requests\[1\]: has no tokens"),
        ([[5]], 0, r"requests\[0\]: max_new is 0"),
        ([[5] * 8000], 193, "8000 tokens and 193 new ones; the model takes 8192"),
        ([[5, 640]], 3, r"tokens\[1\] is 640; the vocabulary has 640"),
        ([[-1]], 3, r"tokens\[0\] is -1"),
    ],
)
def test_errors(engine, prompts, max_new, message):
    with pytest.raises(EngineError, match=message) as error:
        engine.generate(prompts, max_new)
    assert error.value.status == INVALID


@pytest.mark.parametrize(("n_end", "message"), [(1, "end_ids is NULL"), (-1, "n_end is -1")])
def test_errors_of_stop_tokens(engine, n_end, message):
    tokens, results = np.empty([1, 3], np.int32), (Result * 1)()
    with pytest.raises(EngineError, match=message) as error:
        engine.library.call(
            "qvl_generate",
            *(engine.handle, None, 1, (Request * 1)(), ctypes.sizeof(Request)),
            *(n_end, None, OnStep(), None, 3, pointer(tokens), results, None),
        )
    assert error.value.status == INVALID
