"""The GPU engine, compared with upstream's figures; storage types with float32. Needs a GPU (tests/cuda/README.md)."""

from __future__ import annotations

import numpy as np
import pytest
from engine import (
    COMPUTE_BFLOAT16,
    COMPUTE_FLOAT16,
    DEVICE_LIBRARY,
    DTYPES,
    FLOAT32,
    Engine,
    make_config,
    store,
)

pytestmark = pytest.mark.skipif(
    not DEVICE_LIBRARY, reason="needs a GPU: set QWENVL_TEST_LIBRARY (tests/cuda/README.md)"
)

# Largest allowed errors of image features, as a share of the largest value; logits may have four times this error. The
# golden models have random weights, which magnify errors: on a CPU, rounding activations to bfloat16 once per product
# moves features by 3 %.
BOUNDS = {COMPUTE_FLOAT16: 0.015, COMPUTE_BFLOAT16: 0.12}


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest expected value."""
    return float(np.abs(values - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("compute", BOUNDS)
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden(library, golden_model, name, compute):
    """Image features, the logits of a prompt in two chunks, and of decode steps with upstream's tokens."""
    model, bound = golden_model(name), BOUNDS[compute]
    prompt, length = model.prompt, len(model.prompt)
    chunk = 280  # after the image of model a, between the images of model b
    table = np.random.default_rng(1).permutation(length // 32 + 3).tolist()
    figures = model.figures
    config = make_config(model.config, compute=compute)
    with Engine(library, config, store(library, model.weights, FLOAT32)) as engine:
        features = engine.encode_images(model.images)
        assert relative_error(features[:, ::16], figures["features_every_16th_query"]) < bound
        spans = model.spans(features)
        with engine.pool(len(table), 32) as pool:
            first_spans = [(start, features) for start, features in spans if start < chunk]
            second_spans = [(start - chunk, features) for start, features in spans if start >= chunk]
            pool.forward([(prompt[:chunk], 0, length, table)], first_spans)
            logits = pool.forward([(prompt[chunk:], chunk, length, table)], second_spans)
            all_expected = [figures["prefill_logits_last8"][0, -1], *figures["decode_logits"]]
            for i, (token, expected) in enumerate(zip(figures["tokens"], all_expected)):
                assert relative_error(logits[0], expected) < 4 * bound
                second, first = np.sort(expected)[-2:]
                if first - second > 4 * bound * np.abs(expected).max():  # by more than the error of a logit
                    assert logits[0].argmax() == token
                logits = pool.forward([([int(token)], length + i, length, table)])


@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_types(library, golden_model, dtype, pool_dtype):
    """Each storage type of weights with each type of block pool, compared with the same weights and a pool in float32.

    Both engines compute in float16.
    """
    model = golden_model("a")
    packed = store(library, model.weights, DTYPES[dtype])
    rounded = {}
    for name, (data, stored_dtype, shape) in packed.items():
        rounded[name] = library.unpack(data, stored_dtype, shape[0], int(np.prod(shape[1:]))).reshape(shape)
    prompt, length = model.prompt, len(model.prompt)
    table = list(range(20))
    config = make_config(model.config, compute=COMPUTE_FLOAT16)
    results = []
    for weights, pool_storage in (
        (store(library, rounded, FLOAT32), FLOAT32),
        (packed, DTYPES[pool_dtype]),
    ):
        with Engine(library, config, weights) as engine, engine.pool(20, 32, pool_storage) as pool:
            features = engine.encode_images(model.images)
            prefill = pool.forward([(prompt, 0, length, table)], model.spans(features))
            decode = pool.forward([([7], length, length, table)])
            results.append((features, prefill, decode))
    # Pools of these types round keys and values, which are computed in float16.
    bound = 0.1 if pool_dtype in ("int8", "bfloat16") else 0.02
    for values, expected in zip(results[1], results[0]):
        assert relative_error(values, expected) < bound
