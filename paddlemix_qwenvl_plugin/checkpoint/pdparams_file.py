"""Read a .pdparams file of paddle.save, a pickle of a table of NumPy arrays, without executing its code.

| in the pickle | meaning |
| --- | --- |
| an array | a tensor of a state dict; bfloat16 as uint16 bits |
| `(name, array)` | a tensor of any other dict |
| `eval("data", {"data": array})` | a tensor of a static program |
| `UnpackBigParamInfor@@` | arrays above 1 GiB, which protocols 2 and 3 split: shape, and names of the parts |
| `StructuredToParameterName@@` | names of variables, not needed |
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.table_pickle import DAMAGED, RefusedError, TableUnpickler
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line

_SPLIT = "UnpackBigParamInfor@@"
_VARIABLES = "StructuredToParameterName@@"


def read(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read all tensors of a file; those that are not split are read-only views of its bytes.

    Raises:
        QwenVLError: not a Paddle weight file, truncated, or a pickle of more than tensors.
    """
    try:
        with path.open("rb") as file:
            if file.read(1) != b"\x80":  # how a pickle of protocol 2 or newer begins
                raise QwenVLError(f"{path}: not a Paddle weight file")
            file.seek(0)
            table = TableUnpickler(file, _KNOWN).load()
        if not isinstance(table, dict) or not table:
            raise QwenVLError(f"{path}: holds no table of tensors")
        split = table.pop(_SPLIT, {})
        table.pop(_VARIABLES, None)
        tensors = {str(name): _values(value, f"{path}: {name}") for name, value in table.items()}
        for name, parts in split.items():
            values = np.concatenate([tensors.pop(part) for part in parts["slices"]])
            tensors[str(name)] = values.reshape(parts["OriginShape"])
    except RefusedError as error:
        raise QwenVLError(f"{path}: {error}; only tables of tensors are read") from error
    except DAMAGED as error:
        raise QwenVLError(
            f"{path}: not a Paddle weight file, or truncated ({first_line(error)[:200]})"
        ) from error
    return tensors


class _Dtype:
    """Stand-in for numpy.dtype: its code, such as "f4", and its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = str(code)
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stand-in for numpy.ndarray, filled from bytes with checks: NumPy trusts the content of a pickle."""

    values: NDArray[np.generic]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, content = state
        if not isinstance(dtype, _Dtype) or not re.fullmatch("[fiub][0-9]{1,2}", dtype.code):
            raise RefusedError("an array in it holds no numbers")
        content = content.encode("latin1") if isinstance(content, str) else content  # from Python 2
        values = np.frombuffer(content, np.dtype(dtype.code).newbyteorder(dtype.order))
        if min(shape, default=0) < 0 or math.prod(shape) != values.size:
            raise ValueError(f"an array of {values.size} values where {list(shape)} is declared")
        self.values = values.reshape(shape, order="F" if by_columns else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, with which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise RefusedError(f"its pickle encodes as {encoding}")
    return text.encode("latin1")


def _data(expression: str, names: dict[str, Any]) -> Any:
    if expression != "data":
        raise RefusedError(f"its pickle evaluates {expression!r}")
    return names["data"]


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    ("_codecs", "encode"): _encode,
    **{(builtins, "tuple"): tuple for builtins in ("builtins", "__builtin__")},
    **{(builtins, "eval"): _data for builtins in ("builtins", "__builtin__")},
}


def _values(value: Any, where: str) -> NDArray[np.generic]:
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    if not isinstance(value, _Array):
        raise QwenVLError(f"{where} is not a tensor")
    return value.values
