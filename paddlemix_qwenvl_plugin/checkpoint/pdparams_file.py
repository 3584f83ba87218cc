"""Reader of the tensors of a .pdparams file, a pickle of a dict of NumPy arrays; code in the pickle is not run.

| in the pickle | meaning |
| --- | --- |
| an array | a tensor of a state dict; bfloat16 as uint16 bits |
| `(name, array)` | a tensor of any other dict |
| `eval("data", {"data": array})` | a tensor of a static program |
| `UnpackBigParamInfor@@` | shape of each array that protocols 2 and 3 split (1 GiB or more), and names of its parts |
| `StructuredToParameterName@@` | names of variables; ignored |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.table_pickle import (
    DAMAGED,
    RefusedError,
    Span,
    TableUnpickler,
    check_shape,
    empty_table,
)
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

_SPLIT_KEY = "UnpackBigParamInfor@@"
_VARIABLES_KEY = "StructuredToParameterName@@"
_NUMERIC_CODES = {*("f2", "f4", "f8"), *("i1", "i2", "i4", "i8"), *("u1", "u2", "u4", "u8"), "b1"}
# Content of an array in the pickle: its place in the file if it is long (Span), else bytes or latin1 text.
_Content = Union[Span, bytes, str]


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a .pdparams file, and its arrays: a single one, or the parts of a split tensor.

    `numpy_dtype` is the dtype of the arrays in the file, in any byte order.
    """

    shape: tuple[int, ...]
    numpy_dtype: np.dtype[np.generic]
    parts: tuple[_Array, ...]

    @property
    def dtype(self) -> str:
        """The storage type; Paddle stores bfloat16 as uint16 bits."""
        return "bfloat16" if self.numpy_dtype.name == "uint16" else self.numpy_dtype.name


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a .pdparams file.

    Raises:
        QwenVLError: not a Paddle weight file, truncated, or a pickle with other content than tensors.
    """
    try:
        with path.open("rb") as file:
            if file.read(1) != b"\x80":  # first byte of a pickle of protocol 2 or newer
                raise QwenVLError(f"{path}: not a Paddle weight file")
            file.seek(0)
            table = TableUnpickler(file, _KNOWN).load()
        if not isinstance(table, dict) or not table:
            raise QwenVLError(f"{path}: holds no table of tensors")
        split_tensors = table.pop(_SPLIT_KEY, {})
        table.pop(_VARIABLES_KEY, None)
        arrays = {name: _require_array(value, f"{path}: {name}") for name, value in table.items()}
        tensors = {}
        for name, entry in split_tensors.items():
            parts = tuple(arrays.pop(part_name) for part_name in entry["slices"])
            shape = check_shape(entry["OriginShape"])
            if sum(part.size for part in parts) != math.prod(shape):
                raise ValueError(f"the sizes of the parts of {name} do not add up to its shape")
            tensors[name] = StoredTensor(shape, parts[0].dtype, parts)
        for name, array in arrays.items():
            tensors[name] = StoredTensor(array.shape, array.dtype, (array,))
    except RefusedError as error:
        raise QwenVLError(f"{path}: {error}; only tables of tensors are read") from error
    except DAMAGED as error:
        raise QwenVLError(
            f"{path}: not a Paddle weight file, or truncated ({first_line(error)[:200]})"
        ) from error
    return tensors


def read_tensor(path: Path, tensor: StoredTensor) -> NDArray[np.generic]:
    """Read one tensor of a .pdparams file in its storage type (bfloat16 as uint16 bits).

    Raises:
        QwenVLError: the values are damaged.
    """
    try:
        arrays = [part.read(path) for part in tensor.parts]
        values = arrays[0] if len(arrays) == 1 else np.concatenate([array.ravel() for array in arrays])
        return values.reshape(tensor.shape)
    except DAMAGED as error:
        raise QwenVLError(f"{path}: a tensor cannot be read ({first_line(error)[:200]})") from error


class _Dtype:
    """Stand-in for numpy.dtype: its code, such as "f4", and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[np.generic]:
        """The dtype in NumPy. Raises RefusedError for a dtype that is not numeric."""
        if (
            not isinstance(self.code, str)
            or self.code not in _NUMERIC_CODES
            or self.order not in ("<", ">", "=", "|")
        ):
            raise RefusedError("an array in it holds no numbers")
        dtype: np.dtype[np.generic] = np.dtype(self.code).newbyteorder(self.order)
        return dtype


class _Latin1:
    """Stand-in for `_codecs.encode(text, "latin1")`, with which protocol 2 writes bytes."""

    def __init__(self, text: Any, encoding: Any) -> None:
        if not isinstance(encoding, str) or encoding != "latin1":
            raise RefusedError("its pickle encodes text with another codec than latin1")
        self.content = text


class _Array:
    """Stand-in for numpy.ndarray that checks the state in the pickle, which NumPy would trust."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _Dtype):
            raise RefusedError("an array in it holds no numbers")
        self.dtype = dtype.numpy()
        self.shape = check_shape(shape)
        self._fortran_order = bool(fortran_order)
        self._content = content.content if isinstance(content, _Latin1) else content
        n_bytes = self.size * self.dtype.itemsize
        # Protocol 2 writes bytes as latin1 text, one character per byte. A Span has the length of the text in UTF-8,
        # one or two bytes per character, which only bounds the number of characters. `read` checks the exact number.
        stored = self._content.n_bytes if isinstance(self._content, Span) else len(self._content)
        possible = stored // 2 <= n_bytes <= stored if self._is_text else stored == n_bytes
        if not possible:
            raise ValueError(f"an array of {stored} bytes where {list(self.shape)} is declared")

    @property
    def _is_text(self) -> bool:
        return self._content.is_text if isinstance(self._content, Span) else isinstance(self._content, str)

    def read(self, path: Path) -> NDArray[np.generic]:
        """Read the values; raise ValueError if their number is wrong."""
        content: _Content = self._content
        if isinstance(content, Span):
            with path.open("rb") as file:
                file.seek(content.offset)
                raw = file.read(content.n_bytes)
            content = str(raw, "utf-8", "surrogatepass") if content.is_text else raw
        raw = content.encode("latin1") if isinstance(content, str) else content
        values = np.frombuffer(raw, self.dtype)
        if values.size != self.size:
            raise ValueError(f"an array of {values.size} values where {list(self.shape)} is declared")
        values = values.astype(self.dtype.newbyteorder("="), copy=False)
        return values.reshape(self.shape, order="F" if self._fortran_order else "C")


def _reconstruct(*_: Any) -> _Array:
    """Stand-in for NumPy's `_reconstruct`, which makes an array without content; `__setstate__` fills it."""
    return _Array()


def _name_and_array(items: Any) -> Any:
    """Stand-in for `tuple`, with which Paddle pickles (name, array)."""
    if not isinstance(items, (tuple, list)) or len(items) != 2:
        raise RefusedError("a tuple in it is not a (name, tensor) pair")
    return tuple(items)


def _eval_data(expression: Any, variables: Any) -> Any:
    """Stand-in for `eval` that accepts only the expression "data", and returns its value.

    Paddle pickles an array as `eval("data", {"data": array})`.
    """
    if not isinstance(expression, str) or expression != "data":
        shown = repr(expression[:100]) if isinstance(expression, str) else "an object that is not text"
        raise RefusedError(f"its pickle evaluates {shown}")
    return variables["data"]


_KNOWN = {
    ("collections", "OrderedDict"): empty_table,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    ("_codecs", "encode"): _Latin1,
    **{(builtins, "tuple"): _name_and_array for builtins in ("builtins", "__builtin__")},
    **{(builtins, "eval"): _eval_data for builtins in ("builtins", "__builtin__")},
}


def _require_array(value: Any, where: str) -> _Array:
    """Return the array of a table entry, `array` or `(name, array)`; `where` begins the error message."""
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    # An array without dtype: the pickle reconstructs it without setting its state.
    if not isinstance(value, _Array) or not hasattr(value, "dtype"):
        raise QwenVLError(f"{where} is not a tensor")
    return value
