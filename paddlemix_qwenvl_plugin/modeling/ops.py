"""Operators that work in legacy (`.pdmodel`) programs, where Paddle's Python functions for them fail since Paddle 3.3.

Since 3.3 these Python functions call C++ directly and accept only dynamic tensors and PIR values. In a legacy program,
the functions of this module (except `iota`) append the operator by name; otherwise they call Paddle's function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle.base.layer_helper import LayerHelper
from paddle.framework import in_dynamic_or_pir_mode


def iota(n: int) -> paddle.Tensor:
    """Integers 0 to n - 1, int64 [n], without float64 constants.

    `paddle.arange(n)` converts Python numbers to such constants, but export/program.py uses float64 as the stand-in for
    the half type.
    """
    return paddle.arange(paddle.full([1], n, dtype="int64"), dtype="int64")


def matmul(x: paddle.Tensor, y: paddle.Tensor, transpose_y: bool = False) -> paddle.Tensor:
    """Matrix product x @ y, or x @ y^T."""
    if in_dynamic_or_pir_mode():
        return paddle.matmul(x, y, transpose_y=transpose_y)
    return _append("matmul_v2", {"X": x, "Y": y}, x.dtype, trans_x=False, trans_y=transpose_y)


def gelu(x: paddle.Tensor) -> paddle.Tensor:
    """Exact GELU, with erf."""
    if in_dynamic_or_pir_mode():
        return paddle.nn.functional.gelu(x)
    return _append("gelu", {"X": x}, x.dtype, approximate=False)


def argmax(x: paddle.Tensor) -> paddle.Tensor:
    """Argmax over the last axis, int64; the axis is kept with size 1."""
    if in_dynamic_or_pir_mode():
        return paddle.argmax(x, axis=-1, keepdim=True)
    attrs = {"axis": -1, "keepdims": True, "flatten": False, "dtype": 3}  # 3: int64
    return _append("arg_max", {"X": x}, "int64", **attrs)


def total(x: paddle.Tensor, axis: int | None = None) -> paddle.Tensor:
    """Sum over an axis, which is kept with size 1; None: over all elements, with shape [1]."""
    if in_dynamic_or_pir_mode():
        return x.sum(axis=axis, keepdim=True) if axis is not None else x.sum().reshape([1])
    attrs = {"dim": [axis], "keep_dim": True} if axis is not None else {"reduce_all": True}
    out = _append("reduce_sum", {"X": x}, x.dtype, **attrs)
    return out if axis is not None else out.reshape([1])


def _function(name: str, out_dtype: Any = None) -> Callable[..., paddle.Tensor]:
    """Wrap a Paddle function of one or two tensors whose operator has the same name.

    `out_dtype` is the dtype of the operator's output; None: that of the first input.
    """

    def function(*tensors: paddle.Tensor) -> paddle.Tensor:
        if in_dynamic_or_pir_mode():
            return getattr(paddle, name)(*tensors)
        return _append(name, dict(zip("XY", tensors)), out_dtype or tensors[0].dtype)

    return function


cos, sin, log, rsqrt = map(_function, ("cos", "sin", "log", "rsqrt"))
logical_not, logical_and, logical_or = (_function(f"logical_{name}", "bool") for name in ("not", "and", "or"))


def _append(op_type: str, inputs: dict[str, paddle.Tensor], out_dtype: Any, /, **attrs: Any) -> paddle.Tensor:
    helper = LayerHelper(op_type)
    out = helper.create_variable_for_type_inference(out_dtype)
    helper.append_op(type=op_type, inputs=inputs, outputs={"Out": out}, attrs=attrs)
    return out
