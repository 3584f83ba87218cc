"""Errors of the C interface: status codes, and messages that name what is wrong.

Also ids under a span, the size of a pool, and device memory. On a GPU tests/cuda/README.md runs only
test_orders_that_a_gpu_refuses.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine import (
    BAD_WEIGHT,
    BFLOAT16,
    COMPUTE_BFLOAT16,
    DEVICE_LIBRARY,
    FLOAT32,
    INT4_G64,
    INT8,
    INT32,
    INVALID,
    ISAS,
    LANGUAGE,
    UNSUPPORTED,
    VISION,
    DeviceInfo,
    Engine,
    EngineError,
    Library,
    make_config,
    pointer,
    store,
)

from paddlemix_qwenvl_plugin.engine.build import compiler


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model("a")


@pytest.fixture(scope="module")
def stored(library, model):
    return store(library, model.language_weights(), FLOAT32)


@pytest.fixture(scope="module")
def creation_error(library, model, stored):
    """Function that returns the status and the message of an engine that cannot be created."""

    def create(weights=None, stages=LANGUAGE, **changes):
        config = make_config(model.config, stages, **changes)
        with pytest.raises(EngineError) as error:
            Engine(library, config, stored if weights is None else weights)
        return error.value.status, str(error.value)

    return create


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 103}, "config: size is 103; it must be 104 to 4096 (108 in this version)"),
        ({"size": 4097}, "config: size is 4097; it must be 104 to 4096 (108 in this version)"),
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
def test_config(creation_error, changes, message):
    status, line = creation_error(**changes)
    assert status == INVALID
    assert line.startswith(message)


@pytest.mark.skipif(bool(DEVICE_LIBRARY), reason="the GPU back end is installed")
def test_missing_cuda(creation_error):
    status, line = creation_error(device=1)
    assert status == UNSUPPORTED
    assert line.startswith("no GPU back end: libqwenvl_cuda.so: cannot open shared object file")


@pytest.mark.skipif(bool(DEVICE_LIBRARY), reason="the GPU back end is installed")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "no GPU back end: {path}: file too short"),
        ("the engine", "no GPU back end: {path}: undefined symbol: qvl_cuda_back_end"),
        ("another version", "libqwenvl_cuda.so and the engine have different versions"),
    ],
)
def test_wrong_cuda_library(library, tmp_path, content, message):
    """The message has the reason if the file exists, but cannot be used."""
    engine, path = Path(shutil.copy(library.path, tmp_path)), tmp_path / "libqwenvl_cuda.so"
    if content == "text":
        path.write_text("text")
    elif content == "the engine":
        shutil.copy(library.path, path)
    else:
        (tmp_path / "old.cc").write_text('extern "C" const char* const qvl_cuda_back_end[] = {"0.0"};')
        subprocess.run([*compiler(), "-shared", "-fPIC", tmp_path / "old.cc", "-o", path], check=True)
    with pytest.raises(EngineError) as error:
        Library(engine).call("qvl_get_device_info", 1, 0, DeviceInfo(size=ctypes.sizeof(DeviceInfo)))
    expected = message.format(path=path)
    assert str(error.value) == f"{expected}; run qwenvl build-engine --device gpu"
    assert error.value.status == UNSUPPORTED


@pytest.mark.skipif(bool(DEVICE_LIBRARY), reason="a GPU has no ISA")
def test_bfloat16_products_of_another_isa(creation_error):
    status, line = creation_error(isa=ISAS["generic"], compute=COMPUTE_BFLOAT16)
    assert status == UNSUPPORTED
    assert line == (
        "config: compute: bfloat16 products need the ISA avx512_bf16, and this engine uses generic; "
        "choose another type"
    )


def changed(stored, name, data=None, dtype=None, shape=None):
    """Weights with other data, dtype or shape of the weight `name`."""
    old_data, old_dtype, old_shape = stored[name]
    weight = (
        old_data if data is None else data,
        old_dtype if dtype is None else dtype,
        old_shape if shape is None else shape,
    )
    return {**stored, name: weight}


def test_weights(creation_error, stored):
    name = "h.1.attn.c_attn.weight"
    without_name = {key: weight for key, weight in stored.items() if key != name}
    assert creation_error(without_name) == (
        BAD_WEIGHT,
        f"{name}: this weight is missing",
    )
    assert creation_error(changed(stored, name, shape=(256, 768))) == (
        BAD_WEIGHT,
        f"{name}: shape is [256, 768]; it must be [768, 256]",
    )
    assert creation_error(changed(stored, name, shape=(768 * 256,)))[1].endswith("it must be [768, 256]")
    assert creation_error(changed(stored, name, dtype=BFLOAT16)) == (
        BAD_WEIGHT,
        f"{name}: has 786432 bytes; bfloat16 [768, 256] has 393216",
    )
    assert creation_error(changed(stored, name, dtype=77)) == (BAD_WEIGHT, f"{name}: dtype 77 is unknown")
    assert creation_error(changed(stored, "wte.weight", dtype=INT8)) == (
        BAD_WEIGHT,
        "wte.weight: is int8; this weight must be float32, bfloat16 or float16",
    )
    unaligned = np.empty(stored[name][0].nbytes + 1, np.uint8)[1:]
    assert creation_error(changed(stored, name, data=unaligned)) == (
        BAD_WEIGHT,
        f"{name}: data is not aligned to 16 bytes",
    )


def test_order_of_inputs(creation_error, library, model, stored):
    """`NAME.order` must be a permutation of a matrix's inputs, and is ignored for a vector; no matrix may be int32."""
    name = "h.1.attn.c_proj.weight.order"
    order = np.arange(256, dtype=np.int32)[::-1].copy()

    def error_of(data=order, dtype=INT32, shape=(256,)):
        return creation_error({**stored, name: (data, dtype, shape)})

    orders = {"ln_f.weight.order": (order, INT32, (256,)), name: (order, INT32, (256,))}
    with Engine(library, make_config(model.config, LANGUAGE), {**stored, **orders}):
        pass
    assert error_of(dtype=FLOAT32) == (BAD_WEIGHT, f"{name}: must be int32 [256]")
    assert error_of(data=order[:255].copy(), shape=(255,)) == (BAD_WEIGHT, f"{name}: must be int32 [256]")
    unaligned = np.empty(1025, np.uint8)[1:]
    assert error_of(data=unaligned) == (BAD_WEIGHT, f"{name}: data is not aligned to 4 bytes")
    for i, value in ((7, 256), (9, -1), (255, 3)):
        no_permutation = order.copy()
        no_permutation[i] = value
        line = f"{name}: is not a permutation of the 256 inputs; value {i} is {value}"
        assert error_of(data=no_permutation) == (BAD_WEIGHT, line)
    int32_matrix = changed(stored, "h.0.mlp.w1.weight", dtype=INT32)
    line = "h.0.mlp.w1.weight: is int32; this weight must be float32, bfloat16 or float16, or quantized"
    assert creation_error(int32_matrix) == (BAD_WEIGHT, line)


@pytest.mark.skipif(not DEVICE_LIBRARY, reason="needs a GPU: set QWENVL_TEST_LIBRARY (tests/cuda/README.md)")
def test_orders_that_a_gpu_refuses(creation_error, library, model, stored):
    names = ["h.0.mlp.w1.weight", "h.0.mlp.w2.weight"]
    order = np.arange(256, dtype=np.int32)
    line = f"{names[0]} and {names[1]} have their inputs in different orders; a GPU needs one"
    w1_order = {f"{names[0]}.order": (order, INT32, (256,))}
    w2_order = {f"{names[1]}.order": (order[::-1].copy(), INT32, (256,))}
    assert creation_error({**stored, **w1_order}) == (UNSUPPORTED, line)
    assert creation_error({**stored, **w1_order, **w2_order}) == (UNSUPPORTED, line)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    both_stages = store(library, model.weights, FLOAT32)
    _, _, (_, width) = both_stages[name]
    both_stages[f"{name}.order"] = np.arange(width, dtype=np.int32), INT32, (width,)
    line = f"{name}.order: act-order of the vision stage is not supported on a GPU; run this model on the CPU"
    assert creation_error(both_stages, stages=LANGUAGE | VISION) == (UNSUPPORTED, line)


def test_missing_stages(library, model, stored):
    language = Engine(library, make_config(model.config, LANGUAGE), stored)
    with language as engine, pytest.raises(EngineError, match="the engine has no vision stage"):
        engine.encode_images(model.images)
    vision = {name: values for name, values in model.weights.items() if name.startswith("visual.")}
    with Engine(library, make_config(model.config, VISION), store(library, vision, FLOAT32)) as engine:
        for call in (lambda: engine.pool(1), lambda: engine.generate([[1]], 1)):
            with pytest.raises(EngineError, match="the engine has no language stage") as error:
                call()
            assert error.value.status == INVALID
        assert library.dll.qvl_kv_pool_bytes(engine.handle, 1, 32, FLOAT32) == 0


@pytest.fixture(scope="module")
def engine(library, model, stored):
    with Engine(library, make_config(model.config, LANGUAGE), stored) as engine:
        yield engine


# An entry: tokens, n_past, prompt_len, block table. The pool has 4 blocks of 32 tokens.
@pytest.mark.parametrize(
    ("entry", "message"),
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
def test_batches(engine, entry, message):
    with engine.pool(4) as pool, pytest.raises(EngineError) as error:
        pool.forward([entry])
    assert error.value.status == INVALID
    assert str(error.value).startswith(message)


# Spans: (start, count), in a batch of one sequence of 5 tokens.
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
    features = [(start, np.zeros([count, engine.config.hidden], np.float32)) for start, count in spans]
    with engine.pool(4) as pool, pytest.raises(EngineError) as error:
        pool.forward([([1] * 5, 0, 5, [0])], features)
    assert message in str(error.value)


def test_ids_under_a_span_are_not_read(engine):
    with engine.pool(1) as pool:
        features = np.ones([2, engine.config.hidden], np.float32)
        invalid_ids = pool.forward([([5, -9, 1 << 30, 7], 0, 4, [0])], [(1, features)])
        valid_ids = pool.forward([([5, 0, 0, 7], 0, 4, [0])], [(1, features)])
    assert (invalid_ids == valid_ids).all()


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
    n_values = 2 * 2 * 3 * 32 * 256  # keys and values, layers, blocks, tokens of a block, hidden size
    assert engine.library.dll.qvl_kv_pool_bytes(engine.handle, 3, 32, FLOAT32) == n_values * 4
    assert engine.library.dll.qvl_kv_pool_bytes(engine.handle, 3, 32, BFLOAT16) == n_values * 2


def test_nulls(library, engine):
    """NULL handles and arrays are errors, also if the error struct is NULL; NULL may be freed."""
    # 72 and 56: sizes of qvl_tensor and qvl_sampling.
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
    source, target = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
    library.call("qvl_copy", engine.handle, memory, pointer(source), 1000, None)
    library.call("qvl_copy", engine.handle, pointer(target), memory, 1000, None)
    library.call("qvl_synchronize", engine.handle, None)
    library.dll.qvl_dealloc(engine.handle, memory)
    assert (target == source).all()
