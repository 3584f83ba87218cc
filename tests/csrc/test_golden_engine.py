"""The engine on a CPU, compared with upstream's figures (tests/golden); storage types and compute types with float32.

Also its version, and its description with the number of threads.
"""

from __future__ import annotations

import numpy as np
import pytest
from engine import (
    BFLOAT16,
    COMPUTE_BFLOAT16,
    COMPUTE_FLOAT16,
    COMPUTE_FLOAT32,
    DTYPES,
    FLOAT32,
    GROUPS,
    INT32,
    ISAS,
    LANGUAGE,
    UNSUPPORTED,
    Engine,
    EngineError,
    make_config,
    store,
)

BOTH_MODELS = pytest.mark.parametrize("name", ["a", "b"])


@pytest.fixture
def model_and_engine(library, golden_model, name, isa):
    """A golden model and its engine, for an ISA."""
    model = golden_model(name)
    config = make_config(model.config, isa=isa, max_tokens=256)  # the prompts take several passes
    with Engine(library, config, store(library, model.weights, FLOAT32)) as engine:
        yield model, engine


@BOTH_MODELS
def test_features_and_tokens(model_and_engine):
    model, engine = model_and_engine
    features = engine.encode_images(model.images)
    expected = model.figures["features_every_16th_query"]
    assert np.abs(features[:, ::16] - expected).max() <= 1e-4 * np.abs(expected).max()
    tokens, _ = engine.generate([model.prompt], 24, spans=[model.spans(features)])
    assert tokens == [model.figures["tokens"].tolist()]


@pytest.fixture
def model_and_best_engine(library, golden_model, name):
    """A golden model and its engine, for the best ISA of this processor."""
    model = golden_model(name)
    with Engine(library, make_config(model.config), store(library, model.weights, FLOAT32)) as engine:
        yield model, engine


@BOTH_MODELS
@pytest.mark.parametrize("block_tokens", [1, 32, 100])
def test_logits(model_and_best_engine, block_tokens):
    """All golden logits, with the prompt in two chunks, its last 7 tokens one by one, and blocks in random order."""
    model, engine = model_and_best_engine
    prompt, length = model.prompt, len(model.prompt)
    chunk = 280  # after the image of model a, between the images of model b
    prefill_logits = model.figures["prefill_logits_last8"][0]
    spans = model.spans(engine.encode_images(model.images))
    n_blocks = (length + 24) // block_tokens + 1
    table = np.random.default_rng(1).permutation(n_blocks)
    first_spans = [(start, features) for start, features in spans if start < chunk]
    second_spans = [(start - chunk, features) for start, features in spans if start >= chunk]
    with engine.pool(n_blocks, block_tokens) as pool:
        pool.forward([(prompt[:chunk], 0, length, table)], first_spans, logits=False)
        logits = pool.forward([(prompt[chunk : length - 7], chunk, length, table)], second_spans)
        np.testing.assert_allclose(logits[0], prefill_logits[0], atol=1e-3, rtol=0)
        for i in range(1, 8):
            position = length - 8 + i
            logits = pool.forward([(prompt[position : position + 1], position, length, table)])
            np.testing.assert_allclose(logits[0], prefill_logits[i], atol=1e-3, rtol=0)
        for i, (token, row) in enumerate(zip(model.figures["tokens"], model.figures["decode_logits"])):
            assert logits[0].argmax() == token
            logits = pool.forward([([token], length + i, length, table)])
            np.testing.assert_allclose(logits[0], row, atol=1e-3, rtol=0)


@BOTH_MODELS
def test_a_mixed_batch_gives_the_same_as_its_entries_alone(model_and_best_engine):
    """Two prompts, the last chunk of one, and the last tokens of two, of different lengths, in one batch."""
    _, engine = model_and_best_engine
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 500, n).tolist() for n in (70, 5, 33, 200, 1)]
    n_past_tokens = [0, 4, 32, 120, 0]
    tables = [list(range(10 * i, 10 * i + 10)) for i in range(5)]
    with engine.pool(50, 32) as pool:
        entries = []
        for prompt, n_past, table in zip(prompts, n_past_tokens, tables):
            if n_past:
                pool.forward([(prompt[:n_past], 0, len(prompt), table)], logits=False)
            entries.append((prompt[n_past:], n_past, len(prompt), table))
        together = pool.forward(entries)
        alone = [pool.forward([entry])[0] for entry in entries]
    np.testing.assert_allclose(together, alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "int8", "int4_g64", "int4_g128", "uint4_g32", "uint4_g128", "uint8_g64"],
)
def test_storage_types(library, golden_model, dtype):
    """Weights in a storage type, compared with the same, rounded values as float32 weights.

    Only the rounding of activations differs: in products of prompts and images to bfloat16, where the processor has
    instructions for it; in decode steps and lm_head to 8 bits, with quantized weights. The golden models have random
    weights, which magnify errors: rounding activations to bfloat16 once per product moves their features by 3 %. The
    test allows four times this, and 0.8 % where, with the ISA avx2, at most lm_head rounds activations.
    """
    model = golden_model("a")
    packed = store(library, model.weights, DTYPES[dtype])
    rounded = {}
    for name, (data, stored_dtype, shape) in packed.items():
        values = library.unpack(data, stored_dtype, shape[0], int(np.prod(shape[1:])))
        rounded[name] = values.reshape(shape)
    best_isa = make_config(model.config)
    avx2 = make_config(model.config, isa=ISAS["avx2"])  # without products in bfloat16
    prompt = model.prompt, 0, len(model.prompt), list(range(20))
    decode = [7], len(model.prompt), len(model.prompt), list(range(20))
    with Engine(library, best_isa, store(library, rounded, FLOAT32)) as engine:
        expected_features = engine.encode_images(model.images)
        with engine.pool(20) as pool:
            expected_prefill = pool.forward([prompt], model.spans(expected_features))
            expected_decode = pool.forward([decode])
    rounding_bound = 0.03
    for config, bound in ((best_isa, rounding_bound), (avx2, 2e-3)):
        with Engine(library, config, packed) as engine:
            assert_close(engine.encode_images(model.images), expected_features, 4 * bound)
            with engine.pool(20, 32, FLOAT32) as pool:
                assert_close(
                    pool.forward([prompt], model.spans(expected_features)), expected_prefill, 4 * bound
                )
                decode_bound = bound if dtype in ("bfloat16", "float16") else rounding_bound
                assert_close(pool.forward([decode]), expected_decode, 4 * decode_bound)


def assert_close(values, expected, bound):
    """The largest difference, as a share of the largest expected value, is within the bound."""
    assert np.abs(values - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("dtype", GROUPS)
def test_compute_float32(library, golden_model, isa, dtype):
    """QVL_COMPUTE_FLOAT32 with types with zero points, compared with the same values stored as float32.

    The inputs of the matrices of layer 0 are permuted.
    """
    model = golden_model("a")
    weights, random = model.language_weights(), np.random.default_rng(4)
    packed = store(library, weights, dtype)
    dequantized, orders = {}, {}
    for name, (data, stored_dtype, shape) in packed.items():
        values = library.unpack(data, stored_dtype, shape[0], int(np.prod(shape[1:]))).reshape(shape)
        if stored_dtype in GROUPS and "h.0." in name:
            order = random.permutation(shape[1]).astype(np.int32)
            orders[f"{name}.order"] = order, INT32, order.shape
            values = values[:, np.argsort(order)]
        dequantized[name] = values
    prompt, table = model.prompt[:40], [1, 0]
    logits = []
    for stored in ({**packed, **orders}, store(library, dequantized, FLOAT32)):
        config = make_config(model.config, LANGUAGE, isa=isa, compute=COMPUTE_FLOAT32)
        with Engine(library, config, stored) as engine, engine.pool(2) as pool:
            prefill, decode = pool.forward([(prompt, 0, 40, table)]), pool.forward([([7], 40, 40, table)])
            logits.append(np.concatenate([prefill, decode]))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["a"])
def test_bfloat16_cache(model_and_best_engine):
    _, engine = model_and_best_engine
    entry = list(range(100)), 0, 100, list(range(5))
    with engine.pool(5) as float32_pool, engine.pool(5, dtype=BFLOAT16) as bfloat16_pool:
        expected = float32_pool.forward([entry])
        logits = bfloat16_pool.forward([entry])
    assert 0 < np.abs(logits - expected).max() <= 0.05 * np.abs(expected).max()


def test_compute_dtypes(library, golden_model):
    """float32 products are bit-identical to those of an ISA without bfloat16; a CPU does not compute in float16."""
    model = golden_model("a")
    weights = store(library, model.language_weights(), BFLOAT16)
    prompt, logits = model.prompt[:100], []
    for changes in ({"compute": COMPUTE_FLOAT32}, {"isa": ISAS["avx512"]}, {"compute": COMPUTE_BFLOAT16}):
        try:
            engine = Engine(library, make_config(model.config, LANGUAGE, **changes), weights)
        except EngineError as error:
            if error.status != UNSUPPORTED:
                raise
            pytest.skip(f"this processor cannot: {error}")
        with engine, engine.pool(4) as pool:
            logits.append(pool.forward([(prompt, 0, 100, list(range(4)))]))
    float32, avx512, bfloat16 = logits
    assert (float32 == avx512).all()
    assert (float32 != bfloat16).any()
    line = "config: compute: a CPU does not compute in float16"
    with pytest.raises(EngineError, match=line):
        Engine(library, make_config(model.config, LANGUAGE, compute=COMPUTE_FLOAT16), weights)


def test_describe_and_version(library, golden_model):
    model = golden_model("a")
    weights = store(library, model.language_weights(), FLOAT32)
    for isa in ("generic", "best"):
        config = make_config(model.config, LANGUAGE, isa=ISAS[isa], n_threads=3)
        with Engine(library, config, weights) as engine:
            assert engine.describe().endswith(", 3 threads")
            assert (" generic," in engine.describe()) == (isa == "generic")
    assert library.dll.qvl_version() == b"0.2"


def test_omp_num_threads(library, golden_model, monkeypatch):
    model = golden_model("a")
    weights = store(library, model.language_weights(), FLOAT32)
    for value in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with Engine(library, make_config(model.config, LANGUAGE), weights) as engine:
            assert f" {value} thread" in engine.describe()
