"""The table of tensors in a PyTorch weight file: storages and views of them, unpickled without PyTorch.

Unpickling raises RefusedError for content that no table of tensors has, and one of DAMAGED (table_pickle.py), such as
ValueError, for damage; torch_file.py, through which all such files are read, turns both into QwenVLError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.table_pickle import (
    RefusedError,
    TableUnpickler,
    check_shape,
    empty_table,
)
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Class of a storage in the pickle, or dtype of a tensor in an untyped storage -> (storage type, NumPy dtype).
_KINDS = {
    "FloatStorage": ("float32", "<f4"),
    "HalfStorage": ("float16", "<f2"),
    "BFloat16Storage": ("bfloat16", "<u2"),
    "DoubleStorage": ("float64", "<f8"),
    "CharStorage": ("int8", "|i1"),
    "ShortStorage": ("int16", "<i2"),
    "IntStorage": ("int32", "<i4"),
    "LongStorage": ("int64", "<i8"),
    "ByteStorage": ("uint8", "|u1"),
    "BoolStorage": ("bool", "|b1"),
    "float8_e4m3fn": ("float8_e4m3fn", "|u1"),
    "float8_e5m2": ("float8_e5m2", "|u1"),
}


class Storage(NamedTuple):
    """A storage in the pickle: class, key in the file, and number of values (of bytes in an UntypedStorage)."""

    kind: str
    key: str
    size: int

    @property
    def item_bytes(self) -> int:
        """Bytes per value; 1 for an untyped storage. Raises KeyError for an unknown type."""
        return 1 if self.kind == "UntypedStorage" else np.dtype(_KINDS[self.kind][1]).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a view of a storage.

    `kind` is a key of _KINDS once `check_table` has accepted the tensor. `start` and `strides` count values, not bytes,
    also in an UntypedStorage.
    """

    shape: tuple[int, ...]
    kind: str
    storage: Storage
    start: int
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The storage type, such as float32, bfloat16 or int32."""
        return _KINDS[self.kind][0]

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The storage type in NumPy; unsigned integers for bfloat16 and float8."""
        return np.dtype(_KINDS[self.kind][1])

    def view(self, content: bytes) -> NDArray[np.generic]:
        """Extract the tensor's values from the bytes of its storage; only after `check` has accepted the tensor."""
        values = np.frombuffer(content, self.numpy_dtype, len(content) // self.numpy_dtype.itemsize)
        strides = [stride * values.itemsize for stride in self.strides]
        strided = np.lib.stride_tricks.as_strided(values[self.start :], self.shape, strides, writeable=False)
        return np.ascontiguousarray(strided)


class TorchUnpickler(TableUnpickler):
    """Unpickler for the pickles of torch.save."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, _KNOWN)

    def find_class(self, module: str, name: str) -> Any:
        """Resolve storage classes and dtypes to their names, and functions to stand-ins."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if module == "torch" and name.startswith(("float", "bfloat", "int", "uint")):
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        """Resolve ("storage", class, key, device, size); in files before PyTorch 1.6 a sixth entry describes a view.

        Raises:
            RefusedError: the reference is not to a storage, or the storage is a view of another one.
        """
        tag, kind, key, _, size, *view = pid
        if tag != "storage" or not isinstance(kind, str) or not isinstance(key, str) or type(size) is not int:
            raise RefusedError("its pickle refers to something that is not a storage")
        if view not in ([], [None]):
            raise RefusedError("a storage in it is a part of another one")
        return Storage(kind, key, size)


def check(where: str, tensor: StoredTensor, n_bytes: int) -> None:
    """Check that a tensor, accepted by `check_table`, lies within its storage and is not larger than it.

    NumPy does not check the former and would read beyond the storage. A larger tensor repeats values of the storage, as
    an expanded one with a stride of 0 does: a small file could take any amount of memory.

    Raises:
        QwenVLError: the tensor reaches beyond the `n_bytes` of its storage, or has more bytes.
    """
    item_bytes = tensor.numpy_dtype.itemsize
    # Offset of the last value from the first.
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    if (
        len(tensor.shape) != len(tensor.strides)
        or tensor.start < 0
        or (tensor.start + last + 1) * item_bytes > n_bytes
    ):
        raise QwenVLError(f"{where} reaches beyond its {n_bytes} bytes; copy the file again")
    if math.prod(tensor.shape) * item_bytes > n_bytes:
        raise QwenVLError(f"{where} repeats values of its {n_bytes} bytes; save it again with .contiguous()")


def check_table(path: Any, table: Any) -> dict[str, StoredTensor]:
    """Return the table if it is a dict of tensors of types that weights have; otherwise raise QwenVLError."""
    if not isinstance(table, dict) or not table:
        raise QwenVLError(f"{path}: holds no table of tensors")
    for name, tensor in table.items():
        if not isinstance(tensor, StoredTensor):
            raise QwenVLError(f"{path}: {name} is not a tensor")
        if tensor.kind not in _KINDS:
            raise QwenVLError(f"{path}: {name} is a {tensor.kind[:100]}, which no weight is")
    return table


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    if type(start) is not int or abs(start) >= 1 << 48:
        raise ValueError("a tensor has no valid start")
    return StoredTensor(check_shape(shape), storage.kind, storage, start, check_shape(strides))


def _rebuild_with_dtype(
    storage: Any, start: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    if not isinstance(dtype, str):
        raise RefusedError("a tensor without a dtype")
    return replace(_rebuild_tensor(storage, start, shape, strides), kind=dtype)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_KNOWN = {
    ("collections", "OrderedDict"): empty_table,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}
