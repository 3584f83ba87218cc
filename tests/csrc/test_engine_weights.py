"""Weights as separate objects: shared, mapped from a parameter file, rejected if damaged; structs of version 0.1.

Also the CPU as a device, host memory and events.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine import (
    BAD_WEIGHT,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4_G64,
    INT8,
    INT32,
    INVALID,
    LANGUAGE,
    Config,
    DeviceInfo,
    Engine,
    EngineError,
    Stored,
    Weights,
    make_config,
    pointer,
    store,
)

PROMPT = [5, 6, 7, 8, 9]
# Storage type: Paddle's number of the data type, bytes of a value. All other types are stored as Paddle's uint8.
PADDLE_TYPES = {FLOAT32: (5, 4), FLOAT16: (4, 2), BFLOAT16: (22, 2)}
PADDLE_UINT8 = (20, 1)


def varint(value: int, min_bytes: int = 1) -> bytes:
    """Encode a protobuf varint, padded to at least `min_bytes` bytes."""
    encoded = b""
    while value > 127 or min_bytes > 1:
        encoded += bytes([value & 127 | 128])
        value >>= 7
        min_bytes -= 1
    return encoded + bytes([value])


def record(name: str, data: bytes, dtype: int, shape: tuple[int, ...], start: int, n_bytes: int = 0) -> bytes:
    """Build a parameter file's record.

    Args:
        start: the offset of the record in the file; its data is aligned to 64 bytes.
        n_bytes: the number of bytes of data that the record states, if not that of `data`.
    """
    type_number, value_bytes = PADDLE_TYPES.get(dtype, PADDLE_UINT8)
    n_values = (n_bytes or len(data)) // value_bytes
    # A protobuf message of three fields: type (1), number of values (2), and the engine's description (15).
    head = b"\x08" + varint(type_number) + b"\x10" + varint(n_values)
    field = b"qvl1" + struct.pack("<BBH", dtype, len(shape), len(name))
    field += struct.pack(f"<{len(shape)}q", *shape) + name.encode()
    # The padding takes account of 16 zero bytes (Paddle's versions and LoD level) and 4 bytes of the message's length,
    # which precede the head, and of 4 bytes of the field's tag and length.
    field += bytes(-(start + 20 + len(head) + 4 + len(field)) % 64)
    message = head + b"\x7a" + varint(len(field), 3) + field
    return bytes(16) + struct.pack("<i", len(message)) + message + data


def write_params_file(path: Path, stored: dict[str, Stored]) -> Path:
    """Write the format of paddlemix_qwenvl_plugin/artifact/params_file.py, independently of that module."""
    content = b""
    for name, (data, dtype, shape) in stored.items():
        content += record(name, data.tobytes(), dtype, shape, start=len(content))
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model("a")


@pytest.fixture(scope="module")
def mixed(library, model):
    """Weights of five storage types."""
    dtypes = [FLOAT32, BFLOAT16, INT8, INT4_G64, FLOAT16]
    names = sorted(model.language_weights())
    return store(
        library,
        model.language_weights(),
        FLOAT32,
        dtype_of=lambda name: dtypes[names.index(name) % len(dtypes)],
    )


@pytest.fixture(scope="module")
def params_path(tmp_path_factory, mixed):
    return write_params_file(tmp_path_factory.mktemp("params") / "qwen.pdiparams", mixed)


def test_the_tensors_of_a_file(library, mixed, params_path):
    with Weights(library, params_path) as weights:
        assert len(weights) == len(mixed)
        for i, (name, (data, dtype, shape)) in enumerate(mixed.items()):
            tensor = weights[i]
            assert tensor.name.decode() == name
            assert tensor.dtype == dtype
            assert tuple(tensor.shape[: tensor.n_dims]) == shape
            assert tensor.data % 64 == 0
            assert ctypes.string_at(tensor.data, tensor.bytes) == data.tobytes()
        with pytest.raises(EngineError, match=f"i is {len(mixed)}; there are {len(mixed)} weights"):
            weights[len(mixed)]


def test_two_engines_on_weights_that_are_freed(library, model, mixed, params_path):
    config = make_config(model.config, LANGUAGE)
    with Engine(library, config, mixed) as engine:
        expected = engine.generate([PROMPT], 8)
    n_descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with Weights(library, params_path) as weights:
        first, second = (Engine(library, config, weights) for _ in range(2))
    # The mapped file needs no open descriptor.
    assert len(list(Path("/proc/self/fd").iterdir())) == n_descriptors
    with second:
        with first:
            assert first.generate([PROMPT], 8) == expected
        assert second.generate([PROMPT], 8) == expected


def test_files_are_mapped(library, tmp_path):
    """Opening a file of 2 GiB takes less than 1 MiB of memory."""
    name, shape = "wte.weight", (1 << 16, 1 << 13)
    path = tmp_path / "sparse"  # its data takes no space on the disk
    path.write_bytes(record(name, b"", FLOAT32, shape, 0, n_bytes=2 << 30))
    os.truncate(path, path.stat().st_size + (2 << 30))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    with Weights(library, path) as weights:
        assert weights[0].bytes == 2 << 30
        assert resident_bytes() - before < 1 << 20


def open_error(library, path: Path) -> tuple[int, str]:
    """Status and message of a file that the library refuses to open."""
    with pytest.raises(EngineError) as error:
        Weights(library, path)
    return error.value.status, str(error.value)


def test_paths_that_are_no_parameter_files(library, tmp_path):
    missing = tmp_path / "missing"
    assert open_error(library, missing) == (INVALID, f"{missing}: No such file or directory")
    assert open_error(library, tmp_path) == (INVALID, f"{tmp_path}: is not a file")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert open_error(library, pipe) == (INVALID, f"{pipe}: is not a file")
    empty = tmp_path / "empty"
    empty.touch()
    assert open_error(library, empty) == (BAD_WEIGHT, f"{empty}: is empty; export again")


def test_damaged_files(library, mixed, tmp_path):
    """A file that is truncated in the header of its second record, or by its last byte, is rejected.

    If a byte of this header is changed, the file is rejected, or it opens and the name of its first tensor is right.
    """
    names = ["ln_f.weight", "h.0.attn.c_proj.weight", "h.0.ln_1.weight"]
    intact = write_params_file(tmp_path / "intact", {name: mixed[name] for name in names}).read_bytes()
    data, dtype, shape = mixed[names[0]]
    second_record = len(record(names[0], data.tobytes(), dtype, shape, start=0))
    path = tmp_path / "damaged"
    for position in range(second_record, second_record + 128):  # the header has 128 bytes
        path.write_bytes(intact[:position])
        if position > second_record:  # a file that ends after its first record is valid
            assert open_error(library, path)[0] == BAD_WEIGHT
        for flipped_bits in (1, 64, 255):
            changed = bytearray(intact)
            changed[position] ^= flipped_bits
            path.write_bytes(changed)
            open_failure = None
            try:
                with Weights(library, path) as weights:
                    assert weights[0].name == names[0].encode()
            except EngineError as error:
                open_failure = error
            if open_failure:
                assert open_failure.status == BAD_WEIGHT
                assert str(open_failure).startswith(str(path))
    path.write_bytes(intact[:-1])
    assert open_error(library, path)[1].endswith("; export again")


def test_a_file_without_names(library, tmp_path):
    """Paddle itself writes parameter files without tensor names."""
    path = tmp_path / "old.pdiparams"
    message = b"\x08\x05\x10\x04"  # type 5 (float32), 4 values
    path.write_bytes(bytes(16) + struct.pack("<i", len(message)) + message + bytes(16))
    line = f"{path}: does not name its tensors, as exports of an earlier version; export again"
    assert open_error(library, path) == (BAD_WEIGHT, line)


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "n_bytes"),
    [
        ("a", FLOAT32, (16,), 128),  # Paddle's length and the engine's differ
        ("a", FLOAT32, (17,), 64),
        ("a", 13, (16,), 64),
        ("a", INT32, (4, 4), 64),  # vectors only
        ("a", FLOAT32, (), 64),
        ("a", FLOAT32, (1, 1, 1, 1, 16), 64),
        ("a", FLOAT32, (-4, -4), 64),
        ("a", FLOAT32, (1 << 62, 1 << 62), 64),
        ("a", INT8, (1 << 40, 1 << 40), 64),
        ("", FLOAT32, (16,), 64),
        ("a\nb", FLOAT32, (16,), 64),
    ],
)
def test_impossible_records(library, tmp_path, name, dtype, shape, n_bytes):
    path = tmp_path / "file"
    path.write_bytes(record(name, bytes(64), dtype, shape, 0, n_bytes))
    assert open_error(library, path) == (BAD_WEIGHT, f"{path}: damaged at byte 0; export again")


def test_names_given_twice(library, mixed, tmp_path):
    data, dtype, shape = mixed["ln_f.weight"]
    first = record("ln_f.weight", data.tobytes(), dtype, shape, 0)
    path = tmp_path / "twice"
    path.write_bytes(first + record("ln_f.weight", data.tobytes(), dtype, shape, len(first)))
    assert open_error(library, path) == (BAD_WEIGHT, "ln_f.weight: given twice")


def test_unknown_weights_are_ignored_and_missing_ones_named(library, model, mixed):
    config = make_config(model.config, LANGUAGE)
    with Engine(library, config, {**mixed, "h.9.ln_1.weight": mixed["ln_f.weight"]}) as engine:
        assert len(engine.generate([PROMPT], 2)[0][0]) == 2
    incomplete = {name: weight for name, weight in mixed.items() if name != "h.1.ln_2.weight"}
    with pytest.raises(EngineError, match=r"h\.1\.ln_2\.weight: this weight is missing") as error:
        Engine(library, config, incomplete)
    assert error.value.status == BAD_WEIGHT


def test_structs_of_version_0_1(library, model, mixed, params_path):
    """A C program with the shorter structs of version 0.1, and no memory after them, gets the same tokens."""
    config = make_config(model.config, LANGUAGE)
    # The fields of version 0.1 between `size`, the first field, and `compute`, which is newer.
    values = [getattr(config, name) for name, *_ in Config._fields_[1:26]]
    result = subprocess.run(
        [str(library.path.parent / "old_structs"), str(params_path)],
        input=" ".join(map(str, values)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    ones = np.ones([2, config.hidden], np.float32)
    with Engine(library, config, mixed) as engine, engine.pool(2) as pool:
        expected = engine.generate([[1, 2, 3, 4, 5]], 8, spans=[[(1, ones)]], pool=pool)[0][0]
    assert [int(token) for token in result.stdout.split()] == expected


def test_the_device(library):
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    library.call("qvl_get_device_info", 0, 0, info)
    assert info.name
    assert info.threads >= 1
    assert info.isa.decode() in ("generic", "avx2", "avx512", "avx512_bf16")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < info.free_bytes <= info.memory_bytes <= total
    assert (library.dll.qvl_device_count(0), library.dll.qvl_device_count(1)) == (1, 0)
    no_gpu = "no GPU back end: libqwenvl_cuda.so: cannot open shared object file"
    for device, index, line in ((0, 1, "device 0, index 1"), (1, 0, no_gpu), (7, 0, "device 7, index 0")):
        with pytest.raises(EngineError, match=line):
            library.call("qvl_get_device_info", device, index, info)


def test_host_memory_events_and_copies(library, model, mixed):
    with Engine(library, make_config(model.config, LANGUAGE), mixed) as engine:
        memory, event, done = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int32(-1)
        library.call("qvl_host_alloc", engine.handle, 1000, ctypes.byref(memory))
        library.call("qvl_event_create", engine.handle, ctypes.byref(event))
        source, target = np.arange(1000, dtype=np.uint8), np.zeros(1000, np.uint8)
        library.call("qvl_copy_async", engine.handle, memory, pointer(source), 1000, None)
        library.call("qvl_copy_async", engine.handle, pointer(target), memory, 1000, None)
        library.call("qvl_event_record", event, None)
        library.call("qvl_event_wait", event)
        library.call("qvl_event_query", event, ctypes.byref(done))
        library.dll.qvl_event_free(event)
        library.dll.qvl_host_free(engine.handle, memory)
    assert done.value == 1
    assert (target == source).all()
