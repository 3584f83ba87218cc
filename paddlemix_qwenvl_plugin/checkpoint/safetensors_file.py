"""Read safetensors files one tensor at a time, and write them.

The safetensors library maps the complete file, so that every page it touches stays resident. Its NumPy functions lack
bfloat16, and its functions with bfloat16 change between versions. This module instead reads one tensor at a time, by
its offset. Format: 8 bytes little-endian header length, a JSON header, then the raw values.

shards.py reads every format by the same two functions, here `read_header` and `read_tensor`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import MAX_JSON_BYTES, parse_json
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Code in the header -> storage type.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# NumPy has neither bfloat16 nor float8: their bits are read as unsigned integers.
_BITS = {"bfloat16": "<u2", "float8_e4m3fn": "|u1", "float8_e5m2": "|u1"}
_MAX_DIMS = 8


@dataclass(frozen=True)
class StoredTensor:
    """Location (in bytes) and type of a tensor in a safetensors file; `dtype` is a name such as bfloat16 or int32."""

    shape: tuple[int, ...]
    dtype: str
    numpy_dtype: np.dtype[np.generic]
    offset: int
    n_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file.

    Raises:
        QwenVLError: the file is not a safetensors file, its header is damaged or has an unsupported dtype, or the file
            is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length_field = file.read(8)
        length = struct.unpack("<Q", length_field)[0] if len(length_field) == 8 else 0
        if not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
            raise QwenVLError(
                f"{path}: not a safetensors file, cut off in its header, "
                f"or with a header over {MAX_JSON_BYTES >> 20} MiB"
            )
        try:
            header = parse_json(file.read(length), unique=True)
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
    # The format requires tensors without gaps or overlaps up to the end of the file. Of tensors at the same offset, all
    # but the last must be empty.
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].n_bytes)):
        if entry.offset != end:
            raise QwenVLError(
                f"{path}: the header is damaged: {name} begins at byte {entry.offset}, not at {end}, "
                "where the header or the previous tensor ends"
            )
        end += entry.n_bytes
    if end != size:
        raise QwenVLError(f"{path}: {size - end} bytes too many after the last tensor; copy the file again")
    return entries


def read_tensor(path: Path, entry: StoredTensor) -> NDArray[np.generic]:
    """Read one tensor of a safetensors file in its storage type (bfloat16 and float8 as bits, in unsigned integers)."""
    count = int(np.prod(entry.shape, dtype=np.int64))
    values = np.fromfile(path, dtype=entry.numpy_dtype, count=count, offset=entry.offset)
    return values.reshape(entry.shape)


def write(
    path: Path,
    tensors: Mapping[str, NDArray[np.generic]],
    dtype: Union[str, Mapping[str, str]],
    framework: str = "pd",
) -> None:
    """Write a safetensors file with the tensors in the given order.

    Args:
        tensors: name -> values in the storage type (bfloat16 as uint16 bits).
        dtype: the storage type of all tensors, such as float32, bfloat16 or int32, or name -> storage type.
        framework: value of the metadata key "format": "pd", or "pt", which transformers requires.
    """
    codes = {name: code for code, name in _DTYPES.items()}
    dtypes = dict.fromkeys(tensors, dtype) if isinstance(dtype, str) else dtype
    header: dict[str, object] = {"__metadata__": {"format": framework}}
    offset = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": codes[dtypes[name]],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # values start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, values in tensors.items():
            file.write(np.ascontiguousarray(values, dtype=_numpy(dtypes[name])).data)


def _entry(where: str, value: dict[str, Any], base: int) -> StoredTensor:
    code = value["dtype"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise QwenVLError(f"{where} has the unsupported dtype {code if isinstance(code, str) else '?'}")
    [begin, end], shape = value["data_offsets"], value["shape"]
    if not isinstance(shape, list) or not all(
        type(number) is int and number >= 0 for number in (begin, end, *shape)
    ):
        raise ValueError("a size or an offset is not a whole number from 0 on")
    if end < begin:
        raise ValueError("negative size")
    if len(shape) > _MAX_DIMS:  # the product of a million sizes takes hours
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    return StoredTensor(tuple(shape), _DTYPES[code], _numpy(_DTYPES[code]), base + begin, end - begin)


def _numpy(dtype: str) -> np.dtype[np.generic]:
    """The little-endian NumPy dtype of a storage type."""
    numpy_dtype: np.dtype[np.generic] = np.dtype(_BITS.get(dtype) or dtype).newbyteorder("<")
    return numpy_dtype
