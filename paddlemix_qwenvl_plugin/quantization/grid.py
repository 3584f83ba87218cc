"""Quantization grids: the scale and zero point of each group of columns, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Fractions of a group's range to try. Clipping outliers gives the other values a finer step.
_RANGE_FRACTIONS = np.linspace(1.0, 0.5, 24)


@dataclass
class Quantized:
    """A quantized matrix [out, in]: value = scale * (integer - zero), with a scale and zero point per group of a row.

    Attributes:
        integers: integers from 0 to 2^bits - 1, as float32 [out, in].
        scales: values that float16 holds exactly, as float32 [out, groups].
        zeros: integers from 1 to 2^bits - 1, as float32 [out, groups]. A GPTQ file stores the zero point minus one in
            `bits` bits, and readers differ for the zero points 0 and 2^bits, which are stored as the same bits.
    """

    integers: Floats
    scales: Floats
    zeros: Floats

    @property
    def group(self) -> int:
        """Columns per group."""
        return int(self.integers.shape[1] // self.scales.shape[1])

    def values(self) -> Floats:
        """Dequantize the matrix: float32 [out, in]."""
        by_group = self.integers.reshape(*self.scales.shape, self.group)
        values: Floats = (by_group - self.zeros[..., None]) * self.scales[..., None]
        return values.reshape(self.integers.shape)


def to_half(values: Floats) -> Floats:
    """Round scales to float16, their storage type; if the result is not positive, take the smallest positive number."""
    smallest = np.finfo(np.float16).smallest_subnormal
    return np.asarray(np.maximum(values.astype(np.float16), smallest), np.float32)


def nearest(columns: Floats, scale: Floats, zero: Floats, top: int) -> Floats:
    """Quantize values to the nearest integers 0 to `top`; the arguments broadcast against each other."""
    return np.asarray(np.clip(np.rint(columns / scale) + zero, 0, top), np.float32)


def best_grid(columns: Floats, importance: Floats, bits: int) -> tuple[Floats, Floats]:
    """Choose the scale and zero point of every row for one group of columns.

    For each row, the widest range contains 0 and all values of the group, the narrowest is half as wide. Selects the
    range with the least squared error of rounding to nearest, weighted per column.

    Args:
        columns: [out, group].
        importance: [group], weight of each column's squared error: the diagonal of the Hessian, or ones.
        bits: 4 or 8.

    Returns:
        Scales and zero points, each [out].
    """
    top = 2**bits - 1
    low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
    least_error = np.full(len(columns), np.inf, np.float32)
    scales, zeros = np.ones_like(least_error), np.ones_like(least_error)
    for fraction in _RANGE_FRACTIONS:
        scale = to_half((high - low) * np.float32(fraction / top))
        zero = np.clip(np.rint(-low * np.float32(fraction) / scale), 1, top)
        integers = nearest(columns, scale[:, None], zero[:, None], top)
        error = ((integers - zero[:, None]) * scale[:, None] - columns) ** 2 @ importance
        better = error < least_error
        least_error = np.where(better, error, least_error)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros


def round_to_nearest(weight: Floats, bits: int, group: int) -> Quantized:
    """Quantize a matrix [out, in] without calibration: every value to its nearest integer.

    `qwenvl quantize` reports the error of the result beside that of the calibrated quantization.
    """
    n_out, n_in = weight.shape
    scales, zeros = np.empty((2, n_out, n_in // group), np.float32)
    ones = np.ones(group, np.float32)
    for g in range(n_in // group):
        scales[:, g], zeros[:, g] = best_grid(weight[:, g * group : (g + 1) * group], ones, bits)
    column_scales, column_zeros = np.repeat(scales, group, axis=1), np.repeat(zeros, group, axis=1)
    return Quantized(nearest(weight, column_scales, column_zeros, 2**bits - 1), scales, zeros)
