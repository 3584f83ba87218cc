"""Read and write Paddle's combined parameter file (`.pdiparams`), tensor by tensor, aligned for mapping.

Paddle's own writer needs every weight in memory, often twice. The format is one record per tensor, in the order of the
program: uint32 0, uint64 0, uint32 0, int32 length of a TensorDesc message, the message (field 1 the data type, field 2
each dimension), the raw values. Source: paddle/fluid/framework/lod_tensor.cc and tensor_util.cc.

From contract version 3 on, the message ends in a field that Paddle skips as unknown: number 15, its length as a varint
of exactly 3 bytes, then

    4 bytes "qvl1", uint8 qvl_dtype, uint8 n_dims (1 to 4), uint16 length of the name, int64 [n_dims] shape of the
    values (not of their storage), the canonical name (csrc/include/qwenvl.h) in UTF-8, zero bytes

All numbers are little-endian. The zero bytes align the raw values to 64 bytes. The engine reads the same format
(csrc/core/params_file.cc).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.artifact.manifest import Manifest, check_weights
from paddlemix_qwenvl_plugin.artifact.weights import Weight, stage_weights
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.engine.library import DTYPES
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

ALIGNMENT = 64

# Storage type -> data type in the TensorDesc message, and the size of a value of each data type.
_TYPE_CODES = {"float16": 4, "float32": 5, "uint8": 20, "bfloat16": 22}
_ITEM_BYTES = {4: 2, 5: 4, 20: 1, 22: 2}
_STORAGE = {**STORAGE, "uint8": np.dtype("u1")}
_NAMES = {code: name for name, code in DTYPES.items()}

_FIELD = 0x7A  # tag of the field: number 15, length-delimited
_MAGIC = b"qvl1"
_MAX_MESSAGE_BYTES = 1 << 12  # ample: names have about 50 bytes


class Record(NamedTuple):
    """A parameter of the program: shape, and dtype float32, float16, bfloat16, or uint8 (bytes of other types)."""

    shape: tuple[int, ...]
    dtype: str


class Entry(NamedTuple):
    """A weight in the file: canonical name, dtype (a key of library.DTYPES), shape of the values, byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def write_params(
    path: Path,
    records: Mapping[str, Record],
    weights: Mapping[str, Weight],
    stream: Iterable[tuple[str, NDArray[np.generic]]],
) -> None:
    """Write a parameter file and flush it to the disk; on failure the file is removed.

    Args:
        path: the `.pdiparams` file.
        records: every parameter, in the file's order.
        weights: shape and dtype of the values, by the same names.
        stream: (name, values in storage type) in any order, each name once.

    Raises:
        QwenVLError: a value is not a finite number.
    """
    offsets: dict[str, int] = {}
    try:
        with path.open("wb") as file:
            for name, record in records.items():
                file.write(_record_head(record, name, weights[name], file.tell()))
                offsets[name] = file.tell()
                n_values = int(np.prod(record.shape, dtype=np.int64))
                file.seek(n_values * _STORAGE[record.dtype].itemsize, os.SEEK_CUR)
            file.truncate()  # extends the file to the end of the last values, which are written below
            for name, values in stream:
                record = records[name]
                if values.shape != record.shape or values.dtype != _STORAGE[record.dtype]:
                    raise AssertionError(f"{name}: {values.dtype} {values.shape}, program has {record}")
                # uint8: quantized values, checked when they were packed, or the order of a matrix's inputs.
                n_bad = 0 if record.dtype == "uint8" else n_not_finite(values, record.dtype)
                if n_bad:
                    raise QwenVLError(
                        f"{name}: {n_bad} of its values are infinite or not a number; fix the weights"
                    )
                file.seek(offsets.pop(name))
                file.write(np.ascontiguousarray(values).data)
            file.flush()
            os.fsync(file.fileno())
        if offsets:  # internal invariant violated
            raise AssertionError(f"parameters without weights: {sorted(offsets)}")
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def n_not_finite(values: NDArray[np.generic], dtype: str) -> int:
    """Count the values that are infinite or not a number; bfloat16 values are given as their bits, in uint16."""
    # In bfloat16, an exponent of all ones is infinity or NaN.
    finite = (values & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(values)  # type: ignore[operator]
    return int(finite.size - finite.sum())


def read_tensors(path: Path, manifest: Manifest) -> list[Entry]:
    """List the weights of a stage with their byte ranges, in the file's order.

    `check_weights` checks the file; then only record headers are read. Files of contract version 2 have no names: their
    records are in the order of the sorted names.

    Raises:
        QwenVLError: the file is missing, damaged, or not the one that the manifest describes.
    """
    check_weights(path, manifest)
    expected = stage_weights(manifest.config, manifest.stage, manifest.dtype, manifest.quant_type)
    records = list(_records(path))
    if manifest.contract >= 3:
        entries = [record.entry for record in records if record.entry is not None]
    else:
        entries = [
            Entry(name, weight.dtype, weight.shape, record.offset, record.n_bytes)
            for (name, weight), record in zip(sorted(expected.items()), records)
        ]
    found = {entry.name: Weight(entry.shape, entry.dtype) for entry in entries}
    if len(records) != len(expected) or found != expected:
        raise QwenVLError(f"{path}: its tensors are not those of the {manifest.stage} stage; export again")
    return entries


def check_records(path: Path) -> None:
    """Check that the records fill the file; only their headers are read.

    Raises:
        QwenVLError: the file is damaged or cut off, as after an interrupted copy.
    """
    for _ in _records(path):
        pass


def read_first_dims(path: Path) -> list[int]:
    """List the lengths of a file's tensors: one-dimensional float32 placeholders, saved in place of the weights."""
    return [record.n_bytes // 4 for record in _records(path)]


class _FileRecord(NamedTuple):
    """A record of a file; `entry` is None in files without names."""

    offset: int
    n_bytes: int
    entry: Optional[Entry]


def _records(path: Path) -> Iterator[_FileRecord]:
    """Yield the records of a file from their headers; raise QwenVLError if the file is damaged or cut off."""
    position, end = 0, path.stat().st_size
    with path.open("rb") as file:
        while position < end:
            file.seek(position)
            head = file.read(20)
            # 16 zero bytes, then the length of the message.
            length = struct.unpack("<16xi", head)[0] if len(head) == 20 and not any(head[:16]) else 0
            message = file.read(length) if 0 < length <= _MAX_MESSAGE_BYTES else b""
            try:
                record = _parse(message, position + 20 + length)
            except (IndexError, KeyError, ValueError, struct.error) as error:
                raise QwenVLError(f"{path}: damaged at byte {position}; export again") from error
            yield record
            position = record.offset + record.n_bytes
        if position != end:
            raise QwenVLError(f"{path}: cut off; export again")


def _parse(message: bytes, offset: int) -> _FileRecord:
    """Parse the TensorDesc message of a record whose values begin at `offset`.

    If it is damaged, raises one of the exceptions that `_records` catches.
    """
    # The message begins with the tag and the value of field 1. Then each field is a tag and a varint: a dimension, or
    # the length of the content of _FIELD.
    n_bytes, position, content = _ITEM_BYTES[message[1]], 2, b""
    while position < len(message):
        tag = message[position]
        value, position = _read_varint(message, position + 1)
        if tag == _FIELD:
            content = message[position : position + value]
            position += value
        else:
            n_bytes *= value
    if not content:
        return _FileRecord(offset, n_bytes, None)
    magic, code, n_dims, length = struct.unpack_from("<4sBBH", content)
    shape = struct.unpack_from(f"<{n_dims}q", content, 8)
    name = content[8 + 8 * n_dims :][:length].decode("utf-8")
    if magic != _MAGIC or offset % ALIGNMENT:
        raise ValueError("unknown field content, or unaligned values")
    return _FileRecord(offset, n_bytes, Entry(name, _NAMES[code], shape, offset, n_bytes))


def _record_head(record: Record, name: str, weight: Weight, position: int) -> bytes:
    """The header of a record that begins at `position`, padded so that the values are aligned."""
    sizes = b"".join(b"\x10" + _varint(size) for size in record.shape)
    message = b"\x08" + _varint(_TYPE_CODES[record.dtype]) + sizes
    content = struct.pack("<4sBBH", _MAGIC, DTYPES[weight.dtype], len(weight.shape), len(name.encode()))
    content += struct.pack(f"<{len(weight.shape)}q", *weight.shape) + name.encode()
    # 20 bytes before the message, 4 bytes of tag and length before the content.
    content += bytes(-(position + 20 + len(message) + 4 + len(content)) % ALIGNMENT)
    length = len(content)
    length_varint = bytes((length & 127 | 128, length >> 7 & 127 | 128, length >> 14))  # always 3 bytes
    message += bytes([_FIELD]) + length_varint + content
    return struct.pack("<IQIi", 0, 0, 0, len(message)) + message


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Decode a varint: the number and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
        position, shift = position + 1, shift + 7
