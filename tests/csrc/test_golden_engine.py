"""The engine against figures of the real PaddleMIX model, and its other storage types against float32."""

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

NAMES = pytest.mark.parametrize("name", ["a", "b"])


@pytest.fixture
def running(library, golden_model, name, isa):
    model = golden_model(name)
    config = make_config(model.config, isa=isa, max_tokens=256)  # the prompts take several passes
    with Engine(library, config, store(library, model.weights, FLOAT32)) as engine:
        yield model, engine


@NAMES
def test_features_and_tokens(running):
    model, engine = running
    features = engine.encode_images(model.images)
    expected = model.figures["features_every_16th_query"]
    assert np.abs(features[:, ::16] - expected).max() <= 1e-4 * np.abs(expected).max()
    tokens, _ = engine.generate([model.prompt], 24, spans=[model.spans(features)])
    assert tokens == [model.figures["tokens"].tolist()]


@pytest.fixture
def best(library, golden_model, name):
    model = golden_model(name)
    with Engine(library, make_config(model.config), store(library, model.weights, FLOAT32)) as engine:
        yield model, engine


@NAMES
@pytest.mark.parametrize("block_tokens", [1, 32, 100])
def test_logits(best, block_tokens):
    """The prompt in two chunks and its last tokens one by one, in scattered blocks: every logit of the goldens."""
    model, engine = best
    prompt, length = model.prompt, len(model.prompt)
    spans = model.spans(engine.encode_images(model.images))
    n_blocks = (length + 24) // block_tokens + 1
    table = np.random.default_rng(1).permutation(n_blocks)
    first = [span for span in spans if span[0] < 280]
    rest = [(start - 280, features) for start, features in spans if start >= 280]
    with engine.pool(n_blocks, block_tokens) as pool:
        pool.forward([(prompt[:280], 0, length, table)], first, logits=False)
        cut = length - 7
        if cut > 280:
            logits = pool.forward([(prompt[280:cut], 280, length, table)], rest)
            np.testing.assert_allclose(
                logits[0], model.figures["prefill_logits_last8"][0, 0], atol=1e-3, rtol=0
            )
        for i in range(1, 8):
            at = length - 8 + i
            logits = pool.forward([(prompt[at : at + 1], at, length, table)])
            np.testing.assert_allclose(
                logits[0], model.figures["prefill_logits_last8"][0, i], atol=1e-3, rtol=0
            )
        for i, (token, row) in enumerate(zip(model.figures["tokens"], model.figures["decode_logits"])):
            assert logits[0].argmax() == token
            logits = pool.forward([([token], length + i, length, table)])
            np.testing.assert_allclose(logits[0], row, atol=1e-3, rtol=0)


@NAMES
def test_a_mixed_batch_gives_the_same_as_its_parts(best):
    """A prompt, a chunk of a prompt and decode steps of different lengths in one packed batch."""
    _, engine = best
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 500, n).tolist() for n in (70, 5, 33, 200, 1)]
    done = [0, 4, 32, 120, 0]  # tokens before the last forward
    tables = [list(range(10 * i, 10 * i + 10)) for i in range(5)]
    with engine.pool(50, 32) as pool:
        parts, alone = [], []
        for prompt, n, table in zip(prompts, done, tables):
            if n:
                pool.forward([(prompt[:n], 0, len(prompt), table)], logits=False)
            parts.append((prompt[n:], n, len(prompt), table))
        together = pool.forward(parts)
        for part in parts:
            alone.append(pool.forward([part])[0])
    np.testing.assert_allclose(together, alone, atol=2e-4, rtol=0)


BOUNDS = dict.fromkeys(
    ("bfloat16", "float16", "int8", "int4_g64", "int4_g128", "uint4_g32", "uint4_g128", "uint8_g64"), 0.03
)


@pytest.mark.parametrize("name", ["a"])
@pytest.mark.parametrize("dtype", [name for name in BOUNDS if name in DTYPES])
def test_other_types(library, golden_model, name, dtype):
    """Compare with float32 weights of the same, rounded values.

    Only the rounding of activations differs then: to bfloat16 in large products where the machine has
    instructions for it, to 8 bits in small products with quantised weights. The golden models have random weights,
    which magnify errors: rounding activations to bfloat16 once per product moves their features by 3 %.
    """
    model = golden_model(name)
    packed = store(library, model.weights, DTYPES[dtype])
    rounded = {}
    for key, (data, kind, shape) in packed.items():
        values = library.unpack(data, kind, shape[0], int(np.prod(shape[1:])))
        rounded[key] = values.reshape(shape)
    config = make_config(model.config)
    exact_isa = make_config(model.config, isa=min(ISAS["avx2"], 2))
    images = model.images
    prompt, length = model.prompt, len(model.prompt)
    with Engine(library, config, store(library, rounded, FLOAT32)) as exact:
        features = exact.encode_images(images)
        with exact.pool(20) as pool:
            table = list(range(20))
            logits = pool.forward([(prompt, 0, length, table)], model.spans(features))
            decoded = pool.forward([([7], length, length, table)])
    for each, bound in ((config, BOUNDS[dtype]), (exact_isa, 2e-3)):
        with Engine(library, each, packed) as engine:
            got = engine.encode_images(images)
            assert np.abs(got - features).max() <= 4 * bound * np.abs(features).max()
            with engine.pool(20, 32, FLOAT32) as pool:
                got = pool.forward([(prompt, 0, length, table)], model.spans(features))
                assert np.abs(got - logits).max() <= 4 * bound * np.abs(logits).max()
                got = pool.forward([([7], length, length, table)])
                small = bound if dtype in ("bfloat16", "float16") else BOUNDS[dtype]
                assert np.abs(got - decoded).max() <= 4 * small * np.abs(decoded).max()


@pytest.mark.parametrize("dtype", [dtype for dtype in GROUPS if dtype in DTYPES.values()])
def test_exact_products(library, golden_model, isa, dtype):
    """QVL_COMPUTE_FLOAT32: logits equal those of the same values as float32 weights in the original order."""
    model = golden_model("a")
    weights, random = model.language_weights(), np.random.default_rng(4)
    packed = store(library, weights, dtype)
    exact, orders = {}, {}
    for name, (data, kind, shape) in packed.items():
        exact[name] = library.unpack(data, kind, shape[0], int(np.prod(shape[1:]))).reshape(shape)
        if kind in GROUPS and "h.0." in name:
            order = random.permutation(shape[1]).astype(np.int32)
            orders[f"{name}.order"] = order, INT32, order.shape
            exact[name] = exact[name][:, np.argsort(order)]
    prompt, table = model.prompt[:40], [1, 0]
    logits = []
    for stored in ({**packed, **orders}, store(library, exact, FLOAT32)):
        config = make_config(model.config, LANGUAGE, isa=isa, compute=COMPUTE_FLOAT32)
        with Engine(library, config, stored) as engine, engine.pool(2) as pool:
            decoded = pool.forward([(prompt, 0, 40, table)]), pool.forward([([7], 40, 40, table)])
            logits.append(np.concatenate(decoded))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["a"])
def test_bfloat16_cache(best):
    _, engine = best
    prompt, table = list(range(100)), list(range(5))
    with engine.pool(5) as exact, engine.pool(5, dtype=BFLOAT16) as rounded:
        a = exact.forward([(prompt, 0, 100, table)])
        b = rounded.forward([(prompt, 0, 100, table)])
    assert 0 < np.abs(a - b).max() <= 0.05 * np.abs(a).max()


def test_compute(library, golden_model):
    """float32 products are bit-identical to those of the ISAs without bfloat16; a CPU does not compute in float16."""
    model = golden_model("a")
    weights = store(library, model.language_weights(), BFLOAT16)
    prompt, rows = model.prompt[:100], []
    for changes in ({"compute": COMPUTE_FLOAT32}, {"isa": ISAS["avx512"]}, {"compute": COMPUTE_BFLOAT16}):
        try:
            engine = Engine(library, make_config(model.config, LANGUAGE, **changes), weights)
        except EngineError as error:
            if error.status != UNSUPPORTED:
                raise
            pytest.skip(f"this processor cannot: {error}")
        with engine, engine.pool(4) as pool:
            rows.append(pool.forward([(prompt, 0, 100, list(range(4)))]))
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).any()
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
