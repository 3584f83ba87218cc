"""Read PyTorch weight files one tensor at a time, without PyTorch.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl`, a pickle of the table of tensors, and the raw values,
`data/KEY` for each storage.
"""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.table_pickle import DAMAGED, RefusedError, TableUnpickler
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

# Class of a storage in the pickle -> dtype, NumPy dtype.
_STORAGES = {
    "FloatStorage": ("float32", "<f4"),
    "HalfStorage": ("float16", "<f2"),
    "BFloat16Storage": ("bfloat16", "<u2"),
    "DoubleStorage": ("float64", "<f8"),
    "IntStorage": ("int32", "<i4"),
    "LongStorage": ("int64", "<i8"),
}
_DAMAGED = (zipfile.BadZipFile, *DAMAGED)


@dataclass(frozen=True)
class StoredTensor:
    """Location and type of a tensor in a PyTorch file.

    `member` is the archive's member with the storage, `kind` the storage's class (a key of _STORAGES); `start` and
    `strides` count values of the storage.
    """

    shape: tuple[int, ...]
    kind: str
    member: str
    start: int
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """float32, float16, bfloat16, float64, int32 or int64."""
        return _STORAGES[self.kind][0]

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The storage type in NumPy; uint16 for bfloat16."""
        return np.dtype(_STORAGES[self.kind][1])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a PyTorch weight file.

    Raises:
        QwenVLError: not a PyTorch weight file, truncated, or a pickle of more than tensors of these types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [pickled] = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            folder = pickled[: -len("data.pkl")]
            with archive.open(pickled) as file:
                table = _Unpickler(file, _KNOWN).load()
            if not isinstance(table, dict) or not table:
                raise QwenVLError(f"{path}: holds no table of tensors")
            tensors = {}
            for name, tensor in table.items():
                _check_kind(path, name, tensor)
                member = f"{folder}data/{tensor.member}"
                _check_inside(path, name, tensor, archive.getinfo(member).file_size)
                tensors[str(name)] = replace(tensor, member=member)
    except RefusedError as error:
        raise QwenVLError(f"{path}: {error}; only tables of tensors are read") from error
    except _DAMAGED as error:
        raise QwenVLError(
            f"{path}: not a PyTorch weight file (of PyTorch 1.6 or newer), or truncated ({first_line(error)[:200]})"
        ) from error
    return tensors


def read_tensor(path: Path, tensor: StoredTensor) -> NDArray[np.generic]:
    """Read one tensor of a PyTorch file in its storage type (bfloat16 as uint16 bits).

    Raises:
        QwenVLError: the values are damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            values = np.frombuffer(archive.read(tensor.member), tensor.numpy_dtype)
    except _DAMAGED as error:
        raise QwenVLError(f"{path}: {tensor.member} cannot be read ({first_line(error)[:200]})") from error
    strides = [stride * values.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.start :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view)


class _Storage(NamedTuple):
    kind: str
    key: str


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise RefusedError("a tensor without a storage")
    return StoredTensor(tuple(map(int, shape)), *storage, int(start), tuple(map(int, strides)))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(TableUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key = pid[:3]
        if what != "storage" or not isinstance(kind, str):
            raise RefusedError("its pickle refers to something that is no storage")
        return _Storage(kind, str(key))


def _check_kind(path: Path, name: Any, value: Any) -> None:
    if not isinstance(value, StoredTensor):
        raise QwenVLError(f"{path}: {name} is not a tensor")
    if value.kind not in _STORAGES:
        raise QwenVLError(f"{path}: {name} is a {value.kind}, a weight must be a floating-point tensor")


def _check_inside(path: Path, name: Any, tensor: StoredTensor, n_bytes: int) -> None:
    """Check strides and sizes from the file: NumPy does not bound them, and would read outside the storage."""
    valid = (
        len(tensor.shape) == len(tensor.strides)
        and min((tensor.start, *tensor.shape, *tensor.strides)) >= 0
        and math.prod(tensor.shape) * tensor.numpy_dtype.itemsize <= n_bytes
    )
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if not valid or (tensor.start + last + 1) * tensor.numpy_dtype.itemsize > n_bytes:
        raise QwenVLError(f"{path}: {name} reaches beyond its {n_bytes} bytes; copy the file again")
