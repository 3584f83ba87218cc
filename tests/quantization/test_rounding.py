"""GPTQ, coordinate descent, grids and packing, compared with plain implementations and rounding to nearest.

The grid of a group is its scale and zero point, which determine the values that its weights can have.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.quantization.grid import Quantized, best_grid, round_to_nearest
from paddlemix_qwenvl_plugin.quantization.packing import gptq_tensors
from paddlemix_qwenvl_plugin.quantization.rounding import Hessian, descend, gptq, quantize


def correlated(rng, n_tokens, n_in):
    """Inputs with correlated columns of very different sizes, as in a language model."""
    mixed = rng.standard_normal((n_tokens, n_in)) @ rng.standard_normal((n_in, n_in)) / np.sqrt(n_in)
    return (mixed * np.exp(rng.standard_normal(n_in))).astype(np.float32)


def error(weight, values, gram):
    """Squared error of the outputs on inputs X, from gram = X^T X."""
    difference = weight.astype(np.float64) - values
    return float(np.vdot(difference @ gram.astype(np.float64), difference))


def column_by_column(weight, damped_gram, order, scales, zeros, top):
    """Optimal Brain Surgeon in float64: round each column, then eliminate it from the explicit inverse Hessian."""
    remaining, inverse = weight.astype(np.float64), np.linalg.inv(damped_gram.astype(np.float64))
    group = weight.shape[1] // scales.shape[1]
    integers = np.zeros_like(remaining)
    for j in order:
        scale, zero = scales[:, j // group], zeros[:, j // group]
        integers[:, j] = np.clip(np.round(remaining[:, j] / scale) + zero, 0, top)
        rounding_error = remaining[:, j] - (integers[:, j] - zero) * scale
        remaining -= np.outer(rounding_error / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return integers


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_equals_the_plain_algorithm(bits):
    """With more columns than a block of columns, so that the compensation crosses blocks."""
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((5, 192)).astype(np.float32)
    inputs = correlated(rng, 400, 192)
    hessian = Hessian(inputs.T @ inputs, "w")
    found = gptq(weight, hessian, bits, 32)
    expected = column_by_column(weight, hessian.matrix, hessian.order, found.scales, found.zeros, 2**bits - 1)
    # In float32, a value near the middle between two integers may be rounded to the other one.
    assert np.mean(found.integers != expected) < 0.01
    assert np.abs(found.integers - expected).max() <= 1


def test_columns_with_large_inputs_are_rounded_first():
    gram = np.diag([1.0, 9.0, 4.0]).astype(np.float32)
    assert Hessian(gram, "w").order.tolist() == [1, 2, 0]


def test_descent_ends_at_a_minimum():
    """In a row of two weights, no change of one integer by 1 reduces the error."""
    rng = np.random.default_rng(1)
    inputs = correlated(rng, 50, 2)
    hessian = Hessian(inputs.T @ inputs, "w")
    for _ in range(20):
        weight = rng.standard_normal((1, 2)).astype(np.float32)
        found = quantize(weight, hessian, 4, 2)
        scale, zero = found.scales[0, 0], found.zeros[0, 0]
        reached = error(weight, found.values(), hessian.matrix)
        neighbours = []
        for column, step in itertools.product(range(2), (-1, 1)):
            moved = found.integers.copy()
            moved[0, column] = np.clip(moved[0, column] + step, 0, 15)
            neighbours.append(error(weight, (moved - zero) * scale, hessian.matrix))
        assert reached <= min(neighbours) * (1 + 1e-3) + 1e-9


def test_descent_never_increases_the_error():
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((16, 128)).astype(np.float32)
    inputs = correlated(rng, 300, 128)
    hessian = Hessian(inputs.T @ inputs, "w")
    matrix = gptq(weight, hessian, 4, 32)
    errors = [error(weight, matrix.values(), hessian.matrix)]
    for _ in range(4):
        descend(matrix, weight, hessian.matrix, 4)
        errors.append(error(weight, matrix.values(), hessian.matrix))
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:])), errors
    assert errors[-1] < 0.97 * errors[0]
    # `quantize` is GPTQ and three passes of descent.
    quantized = quantize(weight, hessian, 4, 32).values()
    assert error(weight, quantized, hessian.matrix) == pytest.approx(errors[3], rel=1e-4)


def test_descent_sets_the_scales():
    """Descent finds the scales with which a matrix is exact, from scales that are 3% smaller."""
    rng = np.random.default_rng(7)
    integers = rng.integers(0, 16, (6, 64)).astype(np.float32)
    scales = (0.5 + rng.random((6, 2))).astype(np.float16).astype(np.float32)
    zeros = np.full_like(scales, 8)
    exact = Quantized(integers, scales, zeros)
    inputs = correlated(rng, 300, 64)
    hessian = Hessian(inputs.T @ inputs, "w")
    matrix = Quantized(integers.copy(), (scales * 0.97).astype(np.float16).astype(np.float32), zeros)
    for _ in range(6):
        descend(matrix, exact.values(), hessian.matrix, 4)
    np.testing.assert_array_equal(matrix.scales, scales)
    np.testing.assert_array_equal(matrix.integers, integers)


def test_grids_of_clipped_ranges():
    """An outlier is clipped, to round other columns more finely, if its inputs are small, but not if they are large."""
    rng = np.random.default_rng(8)
    columns = rng.uniform(-1, 1, (64, 32)).astype(np.float32)
    columns[:, 3] = 2.5
    importance = np.ones(32, np.float32)
    errors = []
    for outlier_importance in (1e-3, 1e3):
        importance[3] = outlier_importance
        scales, zeros = best_grid(columns, importance, 4)
        integers = np.clip(np.rint(columns / scales[:, None]) + zeros[:, None], 0, 15)
        errors.append(np.abs((integers - zeros[:, None]) * scales[:, None] - columns))
    clipped, not_clipped = errors
    others = np.arange(32) != 3
    assert clipped[:, 3].mean() > 3 * not_clipped[:, 3].mean()
    assert clipped[:, others].mean() < 0.9 * not_clipped[:, others].mean()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_held_out_error_below_rounding_to_nearest(bits, group):
    """Compared on inputs that are not part of the calibration."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((32, 256)).astype(np.float32)
    inputs = correlated(rng, 3000, 256)
    calibration, held_out = inputs[:2000], inputs[2000:]
    hessian = Hessian(calibration.T @ calibration, "w")
    calibrated = quantize(weight, hessian, bits, group).values()
    nearest = round_to_nearest(weight, bits, group).values()
    gram = held_out.T @ held_out
    assert error(weight, calibrated, gram) < 0.7 * error(weight, nearest, gram)


def test_columns_without_inputs():
    """One input is zero for all tokens, or all inputs are."""
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((4, 32)).astype(np.float32)
    inputs = correlated(rng, 100, 32)
    inputs[:, 7] = 0
    for x in (inputs, np.zeros_like(inputs)):
        values = quantize(weight, Hessian(x.T @ x, "w"), 8, 32).values()
        assert np.abs(values - weight).max() < 0.1


def test_inputs_that_are_not_finite():
    with pytest.raises(QwenVLError, match=r"^h.0.mlp.w1: .* not finite"):
        Hessian(np.full((4, 4), np.nan, np.float32), "h.0.mlp.w1")


def test_grids():
    """Scales are float16 numbers, zero points 1 to 15, also for groups of one sign, one value and zeros only."""
    rng = np.random.default_rng(5)
    columns = rng.standard_normal((5, 32)).astype(np.float32)
    columns[1], columns[2], columns[3], columns[4] = abs(columns[1]), -abs(columns[2]), 0, 0.25
    scales, zeros = best_grid(columns, np.ones(32, np.float32), 4)
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    assert scales.min() > 0
    assert zeros.min() >= 1
    assert zeros.max() <= 15
    np.testing.assert_array_equal(zeros, np.rint(zeros))
    values = round_to_nearest(columns, 4, 32).values()
    np.testing.assert_array_equal(values[3], 0)
    span = columns.max(1) - columns.min(1)
    assert (np.abs(values - columns).max(1)[:3] <= 0.3 * span[:3]).all()
    # The squared error is not larger than its bound for the full range, whose errors are up to half a step.
    full_range_scale = span[0] / 15
    assert ((values[0] - columns[0]) ** 2).sum() <= 32 * full_range_scale**2 / 4


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits):
    """Compared with values unpacked one by one, from the definition of the format."""
    rng = np.random.default_rng(6)
    n_out, n_in, group = 16, 64, 32
    matrix = Quantized(
        rng.integers(0, 2**bits, (n_out, n_in)).astype(np.float32),
        rng.random((n_out, 2)).astype(np.float16).astype(np.float32),
        rng.integers(1, 2**bits, (n_out, 2)).astype(np.float32),
    )
    tensors = gptq_tensors(matrix, bits)
    assert {name: (values.dtype, values.shape) for name, values in tensors.items()} == {
        "qweight": (np.int32, (n_in * bits // 32, n_out)),
        "qzeros": (np.int32, (2, n_out * bits // 32)),
        "scales": (np.float16, (2, n_out)),
        "g_idx": (np.int32, (n_in,)),
    }
    per_word, mask = 32 // bits, 2**bits - 1
    for output in range(n_out):
        for i in range(n_in):
            word = int(tensors["qweight"][i // per_word, output])
            integer = (word >> (bits * (i % per_word))) & mask
            i_group = int(tensors["g_idx"][i])
            word = int(tensors["qzeros"][i_group, output // per_word])
            zero = ((word >> (bits * (output % per_word))) & mask) + 1
            assert i_group == i // group
            assert float(tensors["scales"][i_group, output]) * (integer - zero) == matrix.values()[output, i]
