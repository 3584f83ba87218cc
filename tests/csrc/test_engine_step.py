"""qvl_step against qvl_forward, qvl_sample and NumPy; sequences without logits."""

from __future__ import annotations

import numpy as np
import pytest
from engine import BFLOAT16, FLOAT32, INVALID, LANGUAGE, NO_LOGITS, Engine, EngineError, make_config, store

RANDOM = np.random.default_rng(3)
PROMPTS = [RANDOM.integers(0, 600, n).tolist() for n in (70, 5, 33, 200, 1)]
DONE = [0, 4, 32, 120, 0]  # tokens before the step
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


def parts(pool):
    """Prompts, chunks of prompts and single tokens as entries of a batch; earlier tokens are in the pool."""
    made = []
    for i, (prompt, n) in enumerate(zip(PROMPTS, DONE)):
        table = list(range(10 * i, 10 * i + 10))
        if n:
            pool.forward([(prompt[:n], 0, len(prompt), table)], logits=False)
        made.append((prompt[n:], n, len(prompt), table))
    return made


def test_logits_of_some_sequences(pool):
    """Rows of the sequences with logits, selected from the rows of all."""
    batch = parts(pool)
    every = pool.forward(batch)
    some = pool.forward(batch, flags=FLAGS)
    assert some.shape[0] == 3
    np.testing.assert_array_equal(some, every[[0, 2, 4]])
    none = pool.forward(batch, flags=[NO_LOGITS] * 5)
    assert none.shape[0] == 0


def test_a_step_is_forward_and_sample(pool, engine):
    batch = parts(pool)
    settings = [engine.sampling(temperature=2.0, seed=i, presence_penalty=0.5) for i in range(3)]
    counts = RANDOM.integers(0, 3, [3, engine.config.vocab]).astype(np.int32)
    ours, theirs = counts.copy(), counts.copy()
    logits = pool.forward(batch, flags=FLAGS)
    tokens = engine.sample(logits, settings, list(theirs))
    step = pool.step(batch, settings, flags=FLAGS, counts=list(ours))
    np.testing.assert_array_equal(step.logits, logits)
    assert step.tokens.tolist() == tokens
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != counts).sum() == 3


@pytest.mark.parametrize("n", [0, 1, 5, 64])
def test_logprobs(pool, engine, n):
    settings = [engine.sampling(temperature=5.0, seed=i) for i in range(5)]
    step = pool.step(parts(pool), settings, n_logprobs=n)
    exact = step.logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True)) + exact.max(
        1, keepdims=True
    )
    rows = np.arange(5)
    np.testing.assert_allclose(step.logprobs, exact[rows, step.tokens], atol=1e-5)
    order = np.argsort(-step.logits, axis=1, kind="stable")[:, :n]
    np.testing.assert_array_equal(step.top_tokens, order)
    np.testing.assert_allclose(step.top_logprobs, np.take_along_axis(exact, order, 1), atol=1e-5)


def test_a_broken_row_among_others(pool, engine):
    """A prompt with NaN features gives -1 and NaN; the other row gives the same as alone."""
    batch, settings = parts(pool)[:2], [engine.sampling()] * 2
    alone = pool.step(batch, settings, n_logprobs=2)
    features = np.full([3, engine.config.hidden], np.nan, np.float32)
    step = pool.step(batch, settings, spans=[(2, features)], n_logprobs=2)
    assert step.tokens.tolist() == [-1, alone.tokens[1]]
    assert step.top_tokens[0].tolist() == [-1, -1]
    assert np.isnan(step.logprobs[0])
    assert np.isnan(step.top_logprobs[0]).all()
    assert step.logprobs[1] == alone.logprobs[1]


def test_no_rows_write_the_pool(pool, engine):
    prompt, table = PROMPTS[0], list(range(10))
    expected = pool.forward([(prompt, 0, 70, table)])
    with engine.pool(10) as other:
        step = other.step([(prompt[:50], 0, 70, table)], [], flags=[NO_LOGITS])
        assert len(step.tokens) == 0
        np.testing.assert_allclose(other.forward([(prompt[50:], 50, 70, table)]), expected, atol=2e-4, rtol=0)


def test_blocks_move(engine):
    """A copied block, and one that was read and written back, equal the original."""
    prompt = PROMPTS[0][:64]
    for dtype in (FLOAT32, BFLOAT16):
        with engine.pool(6, 32, dtype) as pool, engine.pool(4, 32, dtype) as other:
            pool.forward([(prompt, 0, 65, [0, 1])], logits=False)
            last = [([7], 64, 65, [0, 1, 2])]
            expected = pool.forward(last)
            pool.copy_blocks([0, 1], [4, 3])
            saved = pool.read_blocks([0, 1])
            pool.forward([(prompt[::-1], 0, 65, [0, 1])], logits=False)
            assert (pool.forward(last) != expected).any()
            np.testing.assert_array_equal(pool.forward([([7], 64, 65, [4, 3, 5])]), expected)
            other.write_blocks([3, 1], saved)
            np.testing.assert_array_equal(other.forward([([7], 64, 65, [3, 1, 0])]), expected)


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
