"""Paddle's combined parameter file (`.pdiparams`), written tensor by tensor.

Paddle's own writer wants every weight in memory, often twice. The format is one record a tensor, in an order that
the program fixes: uint32 0, uint64 0, uint32 0, int32 length of a TensorDesc message, the message (field 1 the
data type, field 2 each dimension), the raw values. Source: paddle/fluid/framework/lod_tensor.cc and
tensor_util.cc.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_TYPE_CODES = {"float16": 4, "float32": 5, "uint8": 20, "bfloat16": 22}
_STORAGE = {**STORAGE, "uint8": np.dtype("u1")}


class Record(NamedTuple):
    """A parameter in the file; `dtype` is float32, float16, bfloat16, or uint8 for the bytes of a quantised one."""

    shape: tuple[int, ...]
    dtype: str


def write_params(
    path: Path, records: dict[str, Record], stream: Iterable[tuple[str, NDArray[np.generic]]]
) -> None:
    """Write the file beside `path` and rename it.

    Args:
        path: the `.pdiparams` file.
        records: every parameter, in the file's order.
        stream: (name, values in storage type) in any order, each name once.
    """
    offsets: dict[str, int] = {}
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for name, record in records.items():
                file.write(_record_head(record))
                offsets[name] = file.tell()
                n_values = int(np.prod(record.shape, dtype=np.int64))
                file.seek(n_values * _STORAGE[record.dtype].itemsize, os.SEEK_CUR)
            file.truncate()
            for name, values in stream:
                record = records[name]
                if values.shape != record.shape or values.dtype != _STORAGE[record.dtype]:
                    raise AssertionError(f"{name}: {values.dtype} {values.shape}, program has {record}")
                file.seek(offsets.pop(name))
                file.write(np.ascontiguousarray(values).data)
        if offsets:  # a slip of this package, not of the user's
            raise AssertionError(f"parameters without weights: {sorted(offsets)}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_first_dims(path: Path) -> list[int]:
    """The first dimension of each record of a file of one-dimensional float32 tensors."""
    data, position, dims = path.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from("<i", data, position + 16)
        message = data[position + 20 : position + 20 + length]
        dim, _ = _read_varint(message, 3)
        dims.append(dim)
        position += 20 + length + 4 * dim
    return dims


def check_records(path: Path) -> None:
    """Walk over the heads of the records, which reads little of the file.

    Raises:
        QwenVLError: the records do not fill the file, as after a copy that was broken off.
    """
    sizes = {code: _STORAGE[dtype].itemsize for dtype, code in _TYPE_CODES.items()}
    position, end = 0, path.stat().st_size
    with path.open("rb") as file:
        while position < end:
            file.seek(position)
            head = file.read(20)
            length = struct.unpack("<16xi", head)[0] if len(head) == 20 and not any(head[:16]) else 0
            message = file.read(length) if 0 < length < 1000 else b""
            try:
                count, at = 1, 2
                while at < len(message):
                    dim, at = _read_varint(message, at + 1)
                    count *= dim
                n_bytes = count * sizes[message[1]]
            except (IndexError, KeyError) as error:
                raise QwenVLError(f"{path}: damaged at byte {position}; export again") from error
            position += 20 + length + n_bytes
        if position != end:
            raise QwenVLError(f"{path}: cut off; export again")


def _record_head(record: Record) -> bytes:
    sizes = b"".join(b"\x10" + _varint(n) for n in record.shape)
    message = b"\x08" + _varint(_TYPE_CODES[record.dtype]) + sizes
    return struct.pack("<IQIi", 0, 0, 0, len(message)) + message


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        position, shift = position + 1, shift + 7


def read_tensors(path: Path, manifest: object) -> list:
    raise NotImplementedError
