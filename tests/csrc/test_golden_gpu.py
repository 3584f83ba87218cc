"""A GPU against the real PaddleMIX model's figures, and its storage types against each other (tests/cuda/README.md)."""

from __future__ import annotations

import numpy as np
import pytest
from engine import (
    COMPUTE_BFLOAT16,
    COMPUTE_FLOAT16,
    DEVICE_LIBRARY,
    DTYPES,
    FLOAT32,
    INT8,
    Engine,
    make_config,
    store,
)

pytestmark = pytest.mark.skipif(
    not DEVICE_LIBRARY, reason="needs a GPU: set QWENVL_TEST_LIBRARY (tests/cuda/README.md)"
)

# Largest errors, as a share of the largest value. The golden models have random weights, which magnify errors: on a CPU
# rounding activations to bfloat16 once per product moves features by 3 %.
BOUNDS = {COMPUTE_FLOAT16: 0.015, COMPUTE_BFLOAT16: 0.12}


def share(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("compute", BOUNDS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden(library, golden_model, name, compute):
    """Features, logits of the prompt in chunks, and decode steps along the reference's tokens."""
    model, bound = golden_model(name), BOUNDS[compute]
    prompt, length = model.prompt, len(model.prompt)
    table = np.random.default_rng(1).permutation(length // 32 + 3).tolist()
    figures = model.figures
    equal = close = 0
    config = make_config(model.config, compute=compute)
    with Engine(library, config, store(library, model.weights, FLOAT32)) as engine:
        features = engine.encode_images(model.images)
        assert share(features[:, ::16], figures["features_every_16th_query"]) < bound
        spans = model.spans(features)
        with engine.pool(len(table), 32) as pool:
            first = [span for span in spans if span[0] < 280]
            rest = [(start - 280, features) for start, features in spans if start >= 280]
            logits = pool.forward([(prompt[:280], 0, length, table)], first)
            if length > 280:
                logits = pool.forward([(prompt[280:], 280, length, table)], rest)
            for i, token in enumerate(figures["tokens"]):
                expected = (
                    figures["prefill_logits_last8"][0, -1] if i == 0 else figures["decode_logits"][i - 1]
                )
                assert share(logits[0], expected) < 4 * bound
                top = np.sort(expected)[-2:]
                if top[1] - top[0] > 4 * bound * np.abs(expected).max():  # no rounding may change this token
                    close += 1
                    equal += int(logits[0].argmax() == token)
                logits = pool.forward([([int(token)], length + i, length, table)])
    assert equal == close


@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_types(library, golden_model, dtype, pool_dtype):
    """Against the same values as float32 weights, in float16 arithmetic with a float32 pool."""
    model = golden_model("a")
    packed = store(library, model.weights, DTYPES[dtype])
    rounded = {}
    for key, (data, kind, shape) in packed.items():
        rounded[key] = library.unpack(data, kind, shape[0], int(np.prod(shape[1:]))).reshape(shape)
    prompt, length = model.prompt, len(model.prompt)
    table = list(range(20))
    config = make_config(model.config, compute=COMPUTE_FLOAT16)
    results = []
    for weights, pool_type in (
        (store(library, rounded, FLOAT32), FLOAT32),
        (packed, DTYPES[pool_dtype]),
    ):
        with Engine(library, config, weights) as engine, engine.pool(20, 32, pool_type) as pool:
            features = engine.encode_images(model.images)
            logits = pool.forward([(prompt, 0, length, table)], model.spans(features))
            decoded = pool.forward([([7], length, length, table)])
            results.append((features, logits, decoded))
    # A pool of 8 bits or of bfloat16 rounds keys and values.
    bound = 0.1 if DTYPES[pool_dtype] in (INT8, DTYPES["bfloat16"]) else 0.02
    for got, expected in zip(results[1], results[0]):
        assert share(got, expected) < bound
