"""Rounding of a matrix that minimises the error of its products on calibration inputs.

For inputs X, rounding a row w of the matrix to q causes the squared error (w - q) H (w - q)^T with H = X^T X. Two steps
reduce it:

1. GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022):
   columns are rounded one after the other, and the error of a column is compensated in the columns not yet rounded.
2. Cyclic coordinate descent (as in Behdin et al., "QuantEase", 2023): one after the other, every integer and every
   scale is set to its best value with all others fixed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.quantization.grid import Floats, Quantized, best_grid, nearest, to_half
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Share of the diagonal's mean that is added to the Hessian's diagonal; the value of GPTQ's authors.
DAMPING = 0.01

# Columns whose errors are compensated in the later columns by one product; also the size of the blocks that _invert
# leaves to np.linalg.inv.
_BLOCK_COLUMNS = 128
_SWEEPS = 3  # of coordinate descent


class Hessian:
    """The damped Hessian of the inputs X of a matrix, H = X^T X, and a triangular factor of its inverse.

    Attributes:
        matrix: H plus the damping, float32 [in, in].
        order: the order in which columns are rounded, by descending diagonal of H.
        factor: upper triangular U with U^T U = H^-1, for the damped H with columns and rows in `order`, float32
            [in, in].
    """

    def __init__(self, gram: Floats, name: str) -> None:
        """Damp and factor `gram`, X^T X, which is overwritten.

        Raises:
            QwenVLError: the inputs are not finite; the message begins with `name`.
        """
        diagonal = np.diagonal(gram)
        mean = float(diagonal.mean())
        if not np.isfinite(mean):
            raise QwenVLError(f"{name}: the calibration rows give inputs that are not finite")
        # If all inputs are 0, so is H, and any damping makes it invertible.
        gram[np.diag_indices_from(gram)] += np.float32(DAMPING * mean if mean else 1.0)
        self.matrix = gram
        self.order: NDArray[np.intp] = np.argsort(-diagonal, kind="stable")
        # H in reverse order is L L^T. L with reversed rows and columns is an upper triangular R, H in `order` is R R^T,
        # and U = R^-1.
        reverse = self.order[::-1]
        lower = np.linalg.cholesky(gram[np.ix_(reverse, reverse)].astype(np.float64))
        upper = np.ascontiguousarray(lower[::-1, ::-1])
        del lower  # 1 GB for the 11008 inputs of the 7B model's mlp.c_proj
        _invert(upper)
        self.factor: Floats = upper.astype(np.float32)


def _invert(upper: NDArray[np.float64]) -> None:
    """Invert an upper triangular matrix in place and recursively, with a quarter of the work of np.linalg.inv."""
    n = len(upper)
    if n <= _BLOCK_COLUMNS:
        upper[...] = np.triu(np.linalg.inv(upper))
        return
    low, high = slice(0, n // 2), slice(n // 2, n)
    for half in (low, high):
        _invert(upper[half, half])
    upper[low, high] = -upper[low, low] @ upper[low, high] @ upper[high, high]


def quantize(weight: Floats, hessian: Hessian, bits: int, group: int) -> Quantized:
    """Quantize a matrix [out, in], whose `in` is a multiple of `group`: GPTQ, then sweeps of coordinate descent."""
    matrix = gptq(weight, hessian, bits, group)
    for _ in range(_SWEEPS):
        descend(matrix, weight, hessian.matrix, bits)
    return matrix


def gptq(weight: Floats, hessian: Hessian, bits: int, group: int) -> Quantized:
    """Round the columns in the Hessian's order, with scales and zero points chosen beforehand."""
    n_out, n_in = weight.shape
    top = 2**bits - 1
    diagonal = np.diagonal(hessian.matrix)
    scales, zeros = np.empty((2, n_out, n_in // group), np.float32)
    for g in range(n_in // group):
        columns = slice(g * group, (g + 1) * group)
        scales[:, g], zeros[:, g] = best_grid(weight[:, columns], diagonal[columns], bits)
    order, factor = hessian.order, hessian.factor
    # Columns in rounding order with the compensation so far; [in, out], so that a column is contiguous.
    compensated = np.ascontiguousarray(weight[:, order].T)
    integers = np.empty_like(compensated)
    for first in range(0, n_in, _BLOCK_COLUMNS):
        last = min(first + _BLOCK_COLUMNS, n_in)
        errors = np.empty((last - first, n_out), np.float32)
        for j in range(first, last):
            scale, zero = scales[:, order[j] // group], zeros[:, order[j] // group]
            integers[j] = nearest(compensated[j], scale, zero, top)
            error = (compensated[j] - (integers[j] - zero) * scale) / factor[j, j]
            errors[j - first] = error
            compensated[j + 1 : last] -= factor[j, j + 1 : last, None] * error
        compensated[last:] -= factor[first:last, last:].T @ errors
    in_input_order = np.empty_like(weight)
    in_input_order[:, order] = integers.T
    return Quantized(in_input_order, scales, zeros)


def descend(matrix: Quantized, weight: Floats, hessian: Floats, bits: int) -> None:
    """Improve every scale and integer of `matrix` once, in place; the squared error never grows."""
    top, group = 2**bits - 1, matrix.group
    error = weight - matrix.values()
    for g in range(matrix.scales.shape[1]):
        columns = slice(g * group, (g + 1) * group)
        group_hessian = hessian[columns, columns]
        gradient = error @ hessian[:, columns]
        scale, zero = matrix.scales[:, g], matrix.zeros[:, g]
        steps = matrix.integers[:, columns] - zero[:, None]
        # The squared error is a parabola of the scale, with its minimum at scale + slope / curvature. The bound 1e-30
        # only avoids a division by 0, whose result `where` would not use.
        curvature = np.einsum("oi,oi->o", steps @ group_hessian, steps)
        slope = np.einsum("oi,oi->o", steps, gradient)
        best_scale = np.where(curvature > 0, scale + slope / np.maximum(curvature, 1e-30), scale)
        best_scale = to_half(best_scale)
        decrease = scale - best_scale
        better = curvature * decrease**2 + 2 * slope * decrease < 0  # also after rounding to float16
        # Change of `error`; its product with the Hessian is the change of the gradient.
        change = np.where(better, decrease, 0)[:, None] * steps
        scale = matrix.scales[:, g] = np.where(better, best_scale, scale)
        gradient += change @ group_hessian
        for k in range(group):
            column = columns.start + k
            old = matrix.integers[:, column]
            ideal = (old - zero) * scale + gradient[:, k] / group_hessian[k, k]
            new = nearest(ideal, scale, zero, top)
            step = (old - new) * scale
            gradient += step[:, None] * group_hessian[k]
            change[:, k] += step
            matrix.integers[:, column] = new
        error[:, columns] += change


def relative_error(weight: Floats, values: Floats, gram: Floats) -> float:
    """Relative error of a quantized matrix's products: ||X (w - q)^T|| / ||X w^T||, with `gram` = X^T X."""
    error = weight - values
    total = float(np.vdot(weight @ gram, weight))
    if total <= 0:
        return 0.0
    squared_error = max(0.0, float(np.vdot(error @ gram, error)))  # rounding may make it negative
    return float(np.sqrt(squared_error / total))
