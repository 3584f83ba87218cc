"""qvl_sample, on the CPU or a GPU (conftest.py), compared with the Python sampler (runtime/sampling.py) and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from engine import FLOAT32, INVALID, LANGUAGE, Engine, EngineError, int_pointer, make_config, store

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler


@pytest.fixture(scope="module")
def engine(library, golden_model):
    model = golden_model("a")
    config = make_config(model.config, LANGUAGE)
    with Engine(library, config, store(library, model.language_weights(), FLOAT32)) as engine:
        yield engine


@pytest.mark.parametrize(
    "options",
    [
        {},  # greedy in both samplers
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 1.0, "top_k": 300, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 2.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"repetition_penalty": 1.5, "presence_penalty": -0.5},
    ],
    ids=str,
)
def test_the_same_tokens_as_the_python_sampler(engine, options):
    """With the same seed, both samplers select the same 60 tokens; the first 20 may not be stop tokens."""
    random, vocab = np.random.default_rng(9), engine.config.vocab
    stop_tokens = [3, 7, 500]
    python_options = GenerationOptions(max_new_tokens=99, min_new_tokens=20, seed=12345, **options)
    python_sampler = RowSampler(python_options, stop_tokens, vocab)
    counts = np.zeros(vocab, np.int32)
    forbidden = np.array(stop_tokens, np.int32)
    for step in range(60):
        logits = (random.standard_normal(vocab) * 3).astype(np.float32)
        logits[stop_tokens] += 4
        sampling = engine.sampling(seed=12345, counter=step, **options)
        if step < 20:
            sampling.n_forbidden, sampling.forbidden = 3, int_pointer(forbidden)
        assert engine.sample(logits[None], [sampling], [counts]) == [python_sampler.pick(logits)]
    assert counts.sum() == 60


def test_equal_logits_give_the_lower_id(engine):
    logits = np.zeros([1, engine.config.vocab], np.float32)
    logits[0, [77, 400]] = 2
    assert engine.sample(logits, [engine.sampling()]) == [77]
    assert engine.sample(logits, [engine.sampling(temperature=1, top_k=1)]) == [77]


def test_rows_are_independent(engine):
    """Each row has its own sampling parameters and random number."""
    logits = np.random.default_rng(1).standard_normal([6, engine.config.vocab]).astype(np.float32)
    settings = [engine.sampling(temperature=float(i), seed=i, counter=7 * i) for i in range(6)]
    together = engine.sample(logits, settings)
    assert together == [engine.sample(logits[i : i + 1], [settings[i]])[0] for i in range(6)]


@pytest.mark.parametrize("token_ids", [slice(None), slice(5, 9), slice(639, 640), slice(0, 1)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(engine, value, token_ids):
    """With a NaN, with +inf, or without any finite value, the token is -1 and is not counted; -inf is allowed."""
    logits = np.zeros([1, engine.config.vocab], np.float32)
    logits[0, token_ids] = value
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"presence_penalty": 1.0}):
        counts = np.zeros(engine.config.vocab, np.int32)
        (token,) = engine.sample(logits, [engine.sampling(**options)], [counts])
        valid = (logits < np.inf).all() and np.isfinite(logits).any()  # a comparison with NaN is false
        if valid:
            assert counts[token] == 1
            assert logits[0, token] == logits.max()
        else:
            assert token == -1
            assert counts.sum() == 0


def test_greedy(engine):
    """The same as NumPy's argmax, on rows with many equal values, also with forbidden ids."""
    vocab = engine.config.vocab
    random = np.random.default_rng(4)
    rows = random.integers(-3, 3, [300, vocab]).astype(np.float32)
    for i in range(0, 300, 3):
        rows[i, random.integers(vocab)] = 7
    assert engine.sample(rows, [engine.sampling()] * 300) == rows.argmax(1).tolist()
    forbidden = np.stack([random.permutation(vocab)[:400] for _ in rows]).astype(np.int32)
    settings = [engine.sampling(n_forbidden=400, forbidden=int_pointer(ids)) for ids in forbidden]
    tokens = engine.sample(rows, settings)
    for row, ids in zip(rows, forbidden):
        row[ids] = -1e10
    assert tokens == rows.argmax(1).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1; it must be 0 to 100"),
        ({"temperature": float("nan")}, "temperature is"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be 0 to 1"),
        ({"top_k": -2}, "top_k is -2; it must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"frequency_penalty": 101.0}, "frequency_penalty is 101"),
        ({"presence_penalty": -101.0}, "presence_penalty is -101"),
        ({"presence_penalty": 1.0}, "penalties need counts"),
        ({"n_forbidden": 1}, "forbidden is NULL"),
        ({"n_forbidden": -1}, "n_forbidden is -1"),
        ({"size": 3}, "size is 3"),
    ],
)
def test_errors(engine, changes, message):
    logits = np.zeros([1, engine.config.vocab], np.float32)
    with pytest.raises(EngineError, match=message) as error:
        engine.sample(logits, [engine.sampling(**changes)])
    assert error.value.status == INVALID
    assert str(error.value).startswith("sampling[0]: ")
