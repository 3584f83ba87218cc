"""Errors of callers: a status code and a message that names the argument."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engine import (
    BAD_WEIGHT,
    BFLOAT16,
    DEVICE_LIBRARY,
    FLOAT32,
    INT4_G64,
    INT8,
    INT32,
    INVALID,
    LANGUAGE,
    UNSUPPORTED,
    VISION,
    Engine,
    EngineError,
    make_config,
    store,
)


@pytest.fixture(scope="module")
def parts(library, golden_model):
    model = golden_model("a")
    return library, model, store(library, model.language_weights(), FLOAT32)


def refused(parts, weights=None, stages=LANGUAGE, **changes):
    library, model, stored = parts
    with pytest.raises(EngineError) as error:
        Engine(library, make_config(model.config, stages, **changes), stored if weights is None else weights)
    return error.value.status, str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 8}, "config: size is 8; it must be 108"),
        ({"stages": 0}, "config: stages is 0"),
        ({"stages": 12}, "config: stages is 12"),
        ({"device": 2}, "config: device is 2; it must be 0 to 1"),
        ({"n_threads": -1}, "config: n_threads is -1; it must be 0 to 1024"),
        ({"isa": 9}, "config: isa is 9"),
        ({"compute": 4}, "config: compute is 4; it must be 0 to 3"),
        ({"hidden": 0}, "config: hidden is 0"),
        ({"hidden": 100}, "config: heads (2) x head_dim (128) must equal hidden (100)"),
        ({"head_dim": 255}, "config: head_dim is 255; it must be even"),
        ({"layers": 1 << 30}, "config: layers is 1073741824; it must be 1 to 4096"),
        ({"mlp_width": -4}, "config: mlp_width is -4"),
        ({"vocab": 0}, "config: vocab is 0"),
        ({"norm_epsilon": 0.0}, "config: norm_epsilon is 0; it must be between 0 and 1"),
        ({"norm_epsilon": float("nan")}, "config: norm_epsilon is"),
        ({"rotary_base": 1.0}, "config: rotary_base is 1; it must be over 1"),
        ({"rotary_base": float("inf")}, "config: rotary_base is inf"),
        ({"seq_length": 1}, "config: seq_length is 1"),
        ({"dynamic_ntk": 2}, "config: dynamic_ntk is 2; it must be 0 to 1"),
        ({"stages": 3, "patch_size": 13}, "config: image_size (448) must be a multiple of patch_size (13)"),
        (
            {"stages": 3, "vision_heads": 5},
            "config: vision_width (64) must be a multiple of vision_heads (5)",
        ),
    ],
    ids=str,
)
def test_config(parts, changes, message):
    status, line = refused(parts, **changes)
    assert status == INVALID
    assert line.startswith(message)


@pytest.mark.skipif(bool(DEVICE_LIBRARY), reason="the GPU back end is installed")
def test_missing_cuda(parts):
    status, line = refused(parts, device=1)
    assert status == UNSUPPORTED
    assert line.startswith("no GPU back end: libqwenvl_cuda.so not found")


def changed(parts, name, data=None, dtype=None, shape=None):
    stored = dict(parts[2])
    old = stored[name]
    stored[name] = (
        old[0] if data is None else data,
        old[1] if dtype is None else dtype,
        old[2] if shape is None else shape,
    )
    return stored


def test_weights(parts):
    stored = parts[2]
    name = "h.1.attn.c_attn.weight"
    assert refused(parts, {k: v for k, v in stored.items() if k != name}) == (
        BAD_WEIGHT,
        f"{name}: this weight is missing",
    )
    assert refused(parts, changed(parts, name, shape=(256, 768))) == (
        BAD_WEIGHT,
        f"{name}: shape is [256, 768]; it must be [768, 256]",
    )
    assert refused(parts, changed(parts, name, shape=(768 * 256,)))[1].endswith("it must be [768, 256]")
    assert refused(parts, changed(parts, name, dtype=BFLOAT16)) == (
        BAD_WEIGHT,
        f"{name}: has 786432 bytes; bfloat16 [768, 256] has 393216",
    )
    assert refused(parts, changed(parts, name, dtype=77)) == (BAD_WEIGHT, f"{name}: dtype 77 is unknown")
    assert refused(parts, changed(parts, "wte.weight", dtype=INT8)) == (
        BAD_WEIGHT,
        "wte.weight: is int8; this weight must be float32, bfloat16 or float16",
    )
    unaligned = np.empty(stored[name][0].nbytes + 1, np.uint8)[1:]
    assert refused(parts, changed(parts, name, data=unaligned)) == (
        BAD_WEIGHT,
        f"{name}: data is not aligned to 16 bytes",
    )


def test_order_of_inputs(parts):
    """`NAME.order` permutes the inputs of a matrix; for a vector it is ignored."""
    name = "h.1.attn.c_proj.weight.order"
    order = np.arange(256, dtype=np.int32)[::-1].copy()

    def line(data=order, dtype=INT32, shape=(256,)):
        return refused(parts, {**parts[2], name: (data, dtype, shape)})

    library, model, stored = parts
    others = {"ln_f.weight.order": (order, INT32, (256,)), name: (order, INT32, (256,))}
    with Engine(library, make_config(model.config, LANGUAGE), {**stored, **others}):
        pass
    assert line(dtype=FLOAT32) == (BAD_WEIGHT, f"{name}: must be int32 [256]")
    assert line(data=order[:255].copy(), shape=(255,)) == (BAD_WEIGHT, f"{name}: must be int32 [256]")
    assert line(data=np.empty(1025, np.uint8)[1:]) == (BAD_WEIGHT, f"{name}: data is not aligned to 4 bytes")
    for i, value in ((7, 256), (9, -1), (255, 3)):
        bad = order.copy()
        bad[i] = value
        text = f"{name}: is not a permutation of the 256 inputs; value {i} is {value}"
        assert line(data=bad) == (BAD_WEIGHT, text)
    of_matrix = changed(parts, "h.0.mlp.w1.weight", dtype=INT32)
    text = "h.0.mlp.w1.weight: is int32; this weight must be float32, bfloat16 or float16, or quantised"
    assert refused(parts, of_matrix) == (BAD_WEIGHT, text)


@pytest.mark.skipif(not DEVICE_LIBRARY, reason="needs a GPU: set QWENVL_TEST_LIBRARY (tests/cuda/README.md)")
def test_orders_that_a_gpu_refuses(parts):
    library, model, stored = parts
    names = ["h.0.mlp.w1.weight", "h.0.mlp.w2.weight"]
    order = np.arange(256, dtype=np.int32)
    line = f"{names[0]} and {names[1]} have their inputs in different orders; a GPU needs one"
    first = {f"{names[0]}.order": (order, INT32, (256,))}
    second = {f"{names[1]}.order": (order[::-1].copy(), INT32, (256,))}
    assert refused(parts, {**stored, **first}) == (UNSUPPORTED, line)
    assert refused(parts, {**stored, **first, **second}) == (UNSUPPORTED, line)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    both = store(library, model.weights, FLOAT32)
    width = both[name][2][1]
    both[f"{name}.order"] = np.arange(width, dtype=np.int32), INT32, (width,)
    line = f"{name}.order: act-order of the vision stage is not supported on a GPU; run this model on the CPU"
    assert refused(parts, both, stages=LANGUAGE | VISION) == (UNSUPPORTED, line)


def test_missing_stages(parts):
    library, model, stored = parts
    language = Engine(library, make_config(model.config, LANGUAGE), stored)
    with language as engine, pytest.raises(EngineError, match="the engine has no vision stage"):
        engine.encode_images(model.images)
    vision = {name: values for name, values in model.weights.items() if name.startswith("visual.")}
    with Engine(library, make_config(model.config, 1), store(library, vision, FLOAT32)) as engine:
        for call in (lambda: engine.pool(1), lambda: engine.generate([[1]], 1)):
            with pytest.raises(EngineError, match="the engine has no language stage") as error:
                call()
            assert error.value.status == INVALID
        assert library.dll.qvl_kv_pool_bytes(engine.handle, 1, 32, FLOAT32) == 0


@pytest.fixture(scope="module")
def engine(parts):
    library, model, stored = parts
    with Engine(library, make_config(model.config, LANGUAGE), stored) as engine:
        yield engine


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (([1] * 65, 0, 65, [0, 1]), "sequence 0: 2 blocks of 32 tokens; it has 65 tokens"),
        (([1], 0, 1, [4]), "sequence 0: blocks[0] is 4; the pool has 4"),
        (([1], 0, 1, [-1]), "sequence 0: blocks[0] is -1; the pool has 4"),
        (([1], -1, 1, [0]), "sequence 0: n_past is -1"),
        (([1], 0, 0, [0]), "sequence 0: prompt_len is 0"),
        (([1], 8192, 1, [0] * 300), "sequence 0: 8193 tokens; the model takes 8192"),
        (([640], 0, 1, [0]), "batch: tokens[0] is 640; the vocabulary has 640"),
    ],
    ids=str,
)
def test_batches(engine, part, message):
    with engine.pool(4) as pool, pytest.raises(EngineError) as error:
        pool.forward([part])
    assert error.value.status == INVALID
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 0)], "spans[0]: count is 0"),
        ([(3, 3)], "spans[0]: ends at 6; there are 5 tokens"),
        ([(-1, 2)], "spans[0]: start is -1"),
        ([(0, 3), (2, 1)], "spans[1]: start is 2; the span before ends at 3"),
    ],
    ids=str,
)
def test_spans(engine, spans, message):
    given = [(start, np.zeros([count, engine.config.hidden], np.float32)) for start, count in spans]
    with engine.pool(4) as pool, pytest.raises(EngineError) as error:
        pool.forward([([1] * 5, 0, 5, [0])], given)
    assert message in str(error.value)


def test_ids_under_a_span_are_not_read(engine):
    with engine.pool(1) as pool:
        features = np.ones([2, engine.config.hidden], np.float32)
        a = pool.forward([([5, -9, 1 << 30, 7], 0, 4, [0])], [(1, features)])
        b = pool.forward([([5, 0, 0, 7], 0, 4, [0])], [(1, features)])
    assert (a == b).all()


@pytest.mark.parametrize(
    ("n_blocks", "block_tokens", "dtype", "message"),
    [
        (0, 32, FLOAT32, "pool: n_blocks is 0"),
        (1, 0, FLOAT32, "pool: block_tokens is 0; it must be 1 to 256"),
        (1, 257, FLOAT32, "pool: block_tokens is 257"),
        (1, 32, INT4_G64, "pool: dtype is 3"),
    ],
)
def test_pools(engine, n_blocks, block_tokens, dtype, message):
    with pytest.raises(EngineError) as error:
        engine.pool(n_blocks, block_tokens, dtype)
    assert str(error.value).startswith(message)


def test_pool_bytes(engine):
    assert engine.library.dll.qvl_kv_pool_bytes(engine.handle, 3, 32, FLOAT32) == 2 * 2 * 3 * 32 * 256 * 4
    assert engine.library.dll.qvl_kv_pool_bytes(engine.handle, 3, 32, BFLOAT16) == 2 * 2 * 3 * 32 * 256 * 2


def test_nulls(library, engine):
    """NULL handles and arrays are errors, also if the error struct is NULL."""
    cases = [
        ("qvl_weights_create", (None, 1, 72, None)),
        ("qvl_weights_open", (None, None)),
        ("qvl_engine_create", (None, None, None)),
        ("qvl_alloc", (None, 8, None)),
        ("qvl_alloc", (engine.handle, 8, None)),
        ("qvl_copy", (engine.handle, None, None, 8, None)),
        ("qvl_synchronize", (None, None)),
        ("qvl_encode_images", (None, 1, None, None, None)),
        ("qvl_kv_pool_create", (engine.handle, 1, 32, 0, None)),
        ("qvl_forward", (engine.handle, None, None, None, None)),
        ("qvl_sample", (engine.handle, 1, None, None, 56, None, None, None)),
    ]
    for name, arguments in cases:
        with pytest.raises(EngineError) as error:
            library.call(name, *arguments)
        assert error.value.status == INVALID
        assert "is NULL" in str(error.value)
        assert getattr(library.dll, name)(*arguments, None) == INVALID
    library.dll.qvl_engine_free(None)
    library.dll.qvl_kv_pool_free(None)
    library.dll.qvl_dealloc(engine.handle, None)


def test_device_memory(library, engine):
    memory = ctypes.c_void_p()
    library.call("qvl_alloc", engine.handle, 1000, ctypes.byref(memory))
    assert memory.value
    assert memory.value % 64 == 0
    given, back = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
    library.call("qvl_copy", engine.handle, memory, given.ctypes.data, 1000, None)
    library.call("qvl_copy", engine.handle, back.ctypes.data, memory, 1000, None)
    library.call("qvl_synchronize", engine.handle, None)
    library.dll.qvl_dealloc(engine.handle, memory)
    assert (back == given).all()
