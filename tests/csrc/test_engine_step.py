"""qvl_step, compared with qvl_forward, qvl_sample and NumPy; sequences without logits; copies of blocks.

The tests also run on a GPU (tests/cuda/README.md).
"""

from __future__ import annotations

import numpy as np
import pytest
from engine import BFLOAT16, FLOAT32, INVALID, LANGUAGE, NO_LOGITS, Engine, EngineError, make_config, store

RANDOM = np.random.default_rng(3)
PROMPTS = [RANDOM.integers(0, 600, n).tolist() for n in (70, 5, 33, 200, 1)]
N_PAST = [0, 4, 32, 120, 0]  # tokens computed before the step
FLAGS = [0, NO_LOGITS, 0, NO_LOGITS, 0]


@pytest.fixture(scope="module")
def engine(library, golden_model):
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE, max_tokens=64)  # the batch takes several passes
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        yield engine


@pytest.fixture
def pool(engine):
    with engine.pool(50) as pool:
        yield pool


def prepare_entries(pool):
    """Compute the first N_PAST tokens of the prompts, and return the entries of a batch with the remaining tokens."""
    entries = []
    for i, (prompt, n_past) in enumerate(zip(PROMPTS, N_PAST)):
        table = list(range(10 * i, 10 * i + 10))
        if n_past:
            pool.forward([(prompt[:n_past], 0, len(prompt), table)], logits=False)
        entries.append((prompt[n_past:], n_past, len(prompt), table))
    return entries


def test_logits_of_some_sequences(pool):
    """Sequences without NO_LOGITS get the same logits whether or not the others get any."""
    entries = prepare_entries(pool)
    all_logits = pool.forward(entries)
    some_logits = pool.forward(entries, flags=FLAGS)
    assert some_logits.shape[0] == 3
    np.testing.assert_array_equal(some_logits, all_logits[[0, 2, 4]])
    no_logits = pool.forward(entries, flags=[NO_LOGITS] * 5)
    assert no_logits.shape[0] == 0


def test_a_step_is_forward_and_sample(pool, engine):
    entries = prepare_entries(pool)
    settings = [engine.sampling(temperature=2.0, seed=i, presence_penalty=0.5) for i in range(3)]
    counts = RANDOM.integers(0, 3, [3, engine.config.vocab]).astype(np.int32)
    step_counts, expected_counts = counts.copy(), counts.copy()
    logits = pool.forward(entries, flags=FLAGS)
    tokens = engine.sample(logits, settings, list(expected_counts))
    step = pool.step(entries, settings, flags=FLAGS, counts=list(step_counts))
    np.testing.assert_array_equal(step.logits, logits)
    assert step.tokens.tolist() == tokens
    np.testing.assert_array_equal(step_counts, expected_counts)
    assert (step_counts != counts).sum() == 3


@pytest.mark.parametrize("n", [0, 1, 5, 64])
def test_logprobs(pool, engine, n):
    settings = [engine.sampling(temperature=5.0, seed=i) for i in range(5)]
    step = pool.step(prepare_entries(pool), settings, n_logprobs=n)
    logits = step.logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(5)
    np.testing.assert_allclose(step.logprobs, logprobs[rows, step.tokens], atol=1e-5)
    top_tokens = np.argsort(-step.logits, axis=1, kind="stable")[:, :n]
    np.testing.assert_array_equal(step.top_tokens, top_tokens)
    np.testing.assert_allclose(step.top_logprobs, np.take_along_axis(logprobs, top_tokens, 1), atol=1e-5)


def test_a_row_of_nan_does_not_change_another(pool, engine):
    """A prompt with NaN features gets token -1 and logprobs NaN; the other sequence gets what it gets without them."""
    entries, settings = prepare_entries(pool)[:2], [engine.sampling()] * 2
    expected = pool.step(entries, settings, n_logprobs=2)
    features = np.full([3, engine.config.hidden], np.nan, np.float32)
    step = pool.step(entries, settings, spans=[(2, features)], n_logprobs=2)
    assert step.tokens.tolist() == [-1, expected.tokens[1]]
    assert step.top_tokens[0].tolist() == [-1, -1]
    assert np.isnan(step.logprobs[0])
    assert np.isnan(step.top_logprobs[0]).all()
    assert step.logprobs[1] == expected.logprobs[1]


def test_a_step_without_rows_writes_the_pool(pool, engine):
    """A chunk of a prompt without logits: the remaining tokens then use the keys and values of the chunk."""
    prompt, table = PROMPTS[0], list(range(10))
    expected = pool.forward([(prompt, 0, 70, table)])
    with engine.pool(10) as chunk_pool:
        step = chunk_pool.step([(prompt[:50], 0, 70, table)], [], flags=[NO_LOGITS])
        assert len(step.tokens) == 0
        logits = chunk_pool.forward([(prompt[50:], 50, 70, table)])
        np.testing.assert_array_equal(logits, expected)


def test_copies_of_blocks(engine):
    """Copied blocks, and blocks that were read and then written to another pool, give the logits of the originals."""
    prompt = PROMPTS[0][:64]
    for dtype in (FLOAT32, BFLOAT16):
        with engine.pool(6, 32, dtype) as pool, engine.pool(4, 32, dtype) as other_pool:
            pool.forward([(prompt, 0, 65, [0, 1])], logits=False)
            last_token = [([7], 64, 65, [0, 1, 2])]
            expected = pool.forward(last_token)
            pool.copy_blocks([0, 1], [4, 3])
            host_copy = pool.read_blocks([0, 1])
            pool.forward([(prompt[::-1], 0, 65, [0, 1])], logits=False)  # overwrites the original blocks
            assert (pool.forward(last_token) != expected).any()
            np.testing.assert_array_equal(pool.forward([([7], 64, 65, [4, 3, 5])]), expected)
            other_pool.write_blocks([3, 1], host_copy)
            np.testing.assert_array_equal(other_pool.forward([([7], 64, 65, [3, 1, 0])]), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pool: pool.copy_blocks([0], [4]), r"to\[0\] is 4; the pool has 4 blocks"),
        (lambda pool: pool.copy_blocks([0, -1], [1, 2]), r"from\[1\] is -1"),
        (lambda pool: pool.read_blocks([9]), r"blocks\[0\] is 9"),
        (
            lambda pool: pool.write_blocks([0], np.zeros(100, np.uint8)),
            "bytes is 100; 1 blocks have 131072 each",
        ),
        (lambda pool: pool.step([([1], 0, 1, [0])], []), "rows is 0; the batch has 1 sequences"),
        (
            lambda pool: pool.step([([1], 0, 1, [0])], [pool.engine.sampling()], n_logprobs=65),
            "n_logprobs is 65; it must be 0 to 64",
        ),
        (lambda pool: pool.forward([([1], 0, 1, [0])], flags=[8]), "sequence 0: flags are 8"),
    ],
)
def test_errors(engine, call, message):
    with engine.pool(4) as pool, pytest.raises(EngineError, match=message) as error:
        call(pool)
    assert error.value.status == INVALID
