"""Read safetensors files one tensor at a time, and write them.

The safetensors library maps the whole file, so every page that it touches stays resident; its NumPy functions lack
bfloat16, and the functions that have it change between versions. This module reads by offset instead, one tensor in
memory at a time. Format: 8 bytes little-endian header length, a JSON header, then the raw values.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I32": "int32",
    "I64": "int64",
}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8


@dataclass(frozen=True)
class StoredTensor:
    """Location and type of a tensor in a safetensors file; `dtype` is a value of _DTYPES."""

    shape: tuple[int, ...]
    dtype: str
    numpy_dtype: np.dtype[np.generic]
    offset: int
    n_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file.

    Raises:
        QwenVLError: the file is truncated, too long or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise QwenVLError(f"{path}: not a safetensors file, or cut off in its header")
        try:
            header = json.loads(file.read(length))
            entries = {
                name: _entry(f"{path}: {name}", value, 8 + length)
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise QwenVLError(f"{path}: the safetensors header is damaged ({error})") from error
    for name, entry in entries.items():
        if entry.n_bytes != math.prod(entry.shape) * entry.numpy_dtype.itemsize:
            raise QwenVLError(f"{path}: the header is damaged: {name} has the wrong number of bytes")
        if entry.offset + entry.n_bytes > size:
            raise QwenVLError(
                f"{path}: truncated, {size} bytes of at least {entry.offset + entry.n_bytes}; copy the file again"
            )
    # The format requires tensors without gaps or overlaps up to the end of the file.
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != end:
            raise QwenVLError(
                f"{path}: the header is damaged: {name} begins at byte {entry.offset}, "
                f"the tensor before it ends at {end}"
            )
        end += entry.n_bytes
    if end != size:
        raise QwenVLError(f"{path}: {size - end} bytes too many after the last tensor; copy the file again")
    return entries


def read_tensor(path: Path, entry: StoredTensor) -> NDArray[np.generic]:
    """Read one tensor of a safetensors file in its storage type (bfloat16 as uint16 bits)."""
    count = int(np.prod(entry.shape, dtype=np.int64))
    values = np.fromfile(path, dtype=entry.numpy_dtype, count=count, offset=entry.offset)
    return values.reshape(entry.shape)


def write(path: Path, tensors: dict[str, NDArray[np.generic]], dtype: str) -> None:
    """Write a safetensors file with tensors of one storage type (bfloat16 as uint16 bits), in the given order."""
    code = next(code for code, name in _DTYPES.items() if name == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pd"}}
    offset = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": code,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # values start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, dtype=_NUMPY[code]).data)


def _entry(where: str, value: dict[str, object], base: int) -> StoredTensor:
    code = str(value["dtype"])
    if code not in _DTYPES:
        raise QwenVLError(f"{where} has dtype {code}, a weight must be a floating-point tensor")
    begin, end = map(int, value["data_offsets"])  # type: ignore[call-overload]
    shape = tuple(int(n) for n in value["shape"])  # type: ignore[attr-defined]
    if begin < 0 or end < begin or any(n < 0 for n in shape):  # type: ignore[has-type]
        raise ValueError("negative size or offset")
    if len(shape) > _MAX_DIMS:  # the product of a million sizes takes hours
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    return StoredTensor(shape, _DTYPES[code], np.dtype(_NUMPY[code]), base + begin, end - begin)  # type: ignore[has-type]
