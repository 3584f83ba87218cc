"""Floating-point storage types of weights in NumPy, and conversions between them.

NumPy has no bfloat16: such values are held as their bits, in uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

DTYPES = ("float32", "float16", "bfloat16")
FLOATS = (*DTYPES, "float64")
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


def check_dtype(name: str, flag: str = "--dtype") -> str:
    """Return `name` if it is a supported dtype; otherwise raise UsageError, which names the flag."""
    if name not in DTYPES:
        raise UsageError(f"{flag} {name}: must be one of {', '.join(DTYPES)}")
    return name


def cast(array: NDArray[np.generic], source: str, target: str, name: str) -> NDArray[np.generic]:
    """Convert between storage types, rounding to nearest even; float64 is rounded to float32 first.

    Args:
        array: values of any shape, in the storage type of `source`.
        source: one of FLOATS.
        target: one of DTYPES.
        name: the tensor's name, for the error message.

    Raises:
        QwenVLError: a value does not fit into float16, although all values are finite in float32.
    """
    if source == target:
        return array
    wide = to_float32(array, source)
    if target == "float32":
        return wide
    if target == "bfloat16":
        return _round_to_bfloat16(wide)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(wide).any():
        raise QwenVLError(
            f"{name}: a value of {np.abs(wide).max():.3g} does not fit into float16; use --dtype bfloat16 or float32"
        )
    return half


def to_float32(array: NDArray[np.generic], source: str) -> NDArray[np.float32]:
    """Convert values from `source`, one of FLOATS, to float32."""
    if source == "bfloat16":
        bits = array.astype(np.uint32)
        bits <<= 16  # in place: in float32 the lm_head of a 7B model takes 2.5 GB
        return bits.view(np.float32)
    return array.astype(np.float32)


def _round_to_bfloat16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    # Rounding could turn a NaN into infinity, by cutting off its low bits, or into zero, by a carry into exponent and
    # sign.
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)
