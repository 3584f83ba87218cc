"""Packed matrices: the layout that qwenvl.h documents, and the rounding errors of quantization."""

from __future__ import annotations

import numpy as np
import pytest
from engine import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    GROUPS,
    INT4_G64,
    INT4_G128,
    INT8,
    INT32,
    INVALID,
    UINT4,
    UINT4_G32,
    UINT4_G64,
    UINT8_G128,
    EngineError,
    pointer,
)

RANDOM = np.random.default_rng(3)


def unpack_by_header(packed, dtype, rows, columns):
    """Unpack an int8 or int4 matrix by the layout that qwenvl.h documents."""
    padded = -(-columns // 128) * 128
    if dtype == INT8:
        values = packed[: rows * padded].view(np.int8).reshape(rows, padded)
        scales = packed[rows * padded :].view(np.float32).reshape(rows, 1)
        return (values * scales)[:, :columns]
    group = 64 if dtype == INT4_G64 else 128
    words = packed[: rows * padded // 2].view("<u2").reshape(rows, padded // 128, 1, 32)
    nibbles = (words >> np.array([0, 4, 8, 12], np.uint16).reshape(4, 1)) & 15
    scales = (packed[rows * padded // 2 :].view("<u2").astype(np.uint32) << 16).view(np.float32)
    values = nibbles.reshape(rows, padded).astype(np.float32) - 8
    return (values.reshape(rows, -1, group) * scales.reshape(rows, -1, 1)).reshape(rows, padded)[:, :columns]


@pytest.mark.parametrize("dtype", [INT8, INT4_G64, INT4_G128])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 128), (2, 300)])
def test_layout(library, dtype, shape):
    values = RANDOM.standard_normal(shape).astype(np.float32)
    packed = library.pack(values, dtype)
    assert (library.unpack(packed, dtype, *shape) == unpack_by_header(packed, dtype, *shape)).all()


def random_groups(dtype, rows, columns):
    """Random integers, scales and zero points; the zero points are drawn from a few values, 0 and 256 included."""
    groups_shape = rows, -(-columns // GROUPS[dtype])
    random = np.random.default_rng(17)
    integers = random.integers(0, 16 if dtype in UINT4 else 256, [rows, columns], np.uint8)
    scales = random.standard_normal(groups_shape).astype(np.float16)
    return integers, scales, random.choice([0, 1, 7, 16, 128, 255, 256], groups_shape).astype(np.float16)


@pytest.mark.parametrize("dtype", GROUPS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 128), (2, 300), (4, 1000)])
def test_groups(library, dtype, shape):
    """Integers, scales and zero points are laid out as in qwenvl.h, padded with zeros; unpacked values are exact."""
    rows, columns = shape
    integers, scales, zeros = random_groups(dtype, *shape)
    packed = library.pack_groups(integers, scales, zeros, dtype)
    padded, group = -(-columns // 128) * 128, GROUPS[dtype]
    n_values = rows * padded // (2 if dtype in UINT4 else 1)
    packed_integers = packed[:n_values].reshape(rows, -1)
    if dtype in UINT4:
        words = packed_integers.view("<u2").reshape(rows, padded // 128, 1, 32)
        nibbles = words >> np.array([0, 4, 8, 12], np.uint16).reshape(4, 1) & 15
        packed_integers = nibbles.reshape(rows, padded)
    packed_scales, packed_zeros = packed[n_values:].view(np.float16).reshape(2, rows, padded // group)
    assert len(packed) == n_values + 4 * rows * padded // group
    for array, expected in ((packed_integers, integers), (packed_scales, scales), (packed_zeros, zeros)):
        assert (array[:, : expected.shape[1]] == expected).all()
        assert not array[:, expected.shape[1] :].any()
    group_of_column = np.arange(columns) // group
    scale, zero = scales.astype(np.float64)[:, group_of_column], zeros.astype(np.float64)[:, group_of_column]
    assert (library.unpack(packed, dtype, *shape) == scale * (integers - zero)).all()


# An argument: 0 integers, 1 scales, 2 zero points.
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (0, 16, "integers: one of them is 16; 4 bits hold 0 to 15"),
        (1, np.inf, "scales: one of them is not finite"),
        (1, np.nan, "scales: one of them is not finite"),
        (2, -1, "zeros: one of them is -1; they must be whole numbers from 0 to 256"),
        (2, 257, "zeros: one of them is 257"),
        (2, 0.5, "zeros: one of them is 0.5"),
        (2, np.nan, "zeros: one of them is nan"),
    ],
)
def test_groups_out_of_range(library, argument, value, message):
    arguments = random_groups(UINT4_G32, 3, 70)
    arguments[argument][2, 1] = value
    with pytest.raises(EngineError, match=message) as error:
        library.pack_groups(*arguments, UINT4_G32)
    assert error.value.status == INVALID


def test_dtypes_that_need_another_function(library):
    zeros = np.zeros([1, 128], np.float32)
    for dtype, columns, message in (
        (UINT8_G128, 128, "dtype 11: use qvl_pack_groups"),
        (INT32, 1, "a .1, 1. matrix of dtype 12 cannot be stored"),
    ):
        n_bytes = library.dll.qvl_packed_bytes(dtype, 1, columns)
        with pytest.raises(EngineError, match=message):
            library.call("qvl_pack", dtype, 1, columns, pointer(zeros), pointer(zeros), n_bytes)
    with pytest.raises(EngineError, match="dtype 3 has no groups with zero points"):
        library.pack_groups(*random_groups(UINT4_G64, 1, 128), INT4_G64)
    # int32 is for vectors only: the size of a matrix with two columns is 0.
    assert [library.dll.qvl_packed_bytes(INT32, n, m) for n, m in ((5, 1), (5, 2))] == [20, 0]


@pytest.mark.parametrize(("dtype", "n_steps"), [(INT8, 254), (INT4_G64, 16), (INT4_G128, 16)])
def test_rounding(library, dtype, n_steps):
    """The error is at most half a step; for int4, whose largest values may be clipped, it is less than two steps."""
    values = RANDOM.standard_normal([16, 512]).astype(np.float32)
    error = np.abs(library.unpack(library.pack(values, dtype), dtype, 16, 512) - values)
    group = {INT8: 512, INT4_G64: 64, INT4_G128: 128}[dtype]
    largest = np.abs(values.reshape(16, -1, group)).max(-1, keepdims=True)
    step = 2 * largest / n_steps
    error_in_steps = error.reshape(16, -1, group) / step
    # 1.92: the engine's finest int4 scale maps the largest magnitude to -9.2. The opposite value is clipped from 9.2 to
    # 7, with an error of 2.2 scales, which are 2.2 * 8 / 9.2 steps.
    assert error_in_steps.max() <= (0.501 if dtype == INT8 else 1.92)
    # Errors of rounding, evenly distributed from 0 to half a step, have a standard deviation of 0.14 steps.
    assert error_in_steps.std() < 0.2


@pytest.mark.parametrize(("dtype", "group"), [(INT4_G64, 64), (INT4_G128, 128)])
def test_scales_of_least_error(library, dtype, group):
    """Compared with the scales that map extreme values to -8, no group has a larger error, and the total is smaller."""
    values = RANDOM.standard_normal([16, 512]).astype(np.float32)
    groups = values.reshape(-1, group).astype(np.float64)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    step = extreme / -8
    plain_error = ((np.clip(np.rint(groups / step), -8, 7) * step - groups) ** 2).sum(1)
    unpacked = library.unpack(library.pack(values, dtype), dtype, 16, 512).reshape(-1, group)
    error = ((unpacked - groups) ** 2).sum(1)
    assert (error <= 1.02 * plain_error).all()  # 2 %: the engine rounds scales to bfloat16
    assert error.sum() < 0.93 * plain_error.sum()


def test_exact_values(library):
    values = RANDOM.standard_normal([3, 50]).astype(np.float32)
    assert (library.unpack(library.pack(values, FLOAT32), FLOAT32, 3, 50) == values).all()
    zeros = np.zeros([2, 130], np.float32)
    for dtype in (FLOAT32, BFLOAT16, INT8, INT4_G64, INT4_G128, FLOAT16):
        assert (library.unpack(library.pack(zeros, dtype), dtype, 2, 130) == 0).all()
    truncated = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)  # values of bfloat16
    assert (library.unpack(library.pack(truncated, BFLOAT16), BFLOAT16, 3, 50) == truncated).all()


def test_float16(library):
    """Unpacking of every value but NaN, and rounding as in NumPy, also beyond the smallest and the largest value."""
    all_values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(16, -1)
    all_values = np.where(np.isnan(all_values), np.float16(1), all_values)
    packed = np.ascontiguousarray(all_values).view(np.uint8).ravel()
    assert (library.unpack(packed, FLOAT16, *all_values.shape) == all_values).all()
    magnitudes = np.exp2(RANDOM.uniform(-27, 17, [50, 77]))
    values = (RANDOM.standard_normal([50, 77]) * magnitudes).astype(np.float32)
    ties = (all_values[:, :-1].astype(np.float32) + all_values[:, 1:].astype(np.float32)) / 2
    for source in (values, ties[np.isfinite(ties).all(1)]):
        with np.errstate(over="ignore"):
            expected = source.astype(np.float16).view(np.uint16)
        packed = library.pack(np.ascontiguousarray(source), FLOAT16)
        assert (packed.view(np.uint16).reshape(source.shape) == expected).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [INT8, INT4_G64])
def test_values_that_are_not_finite(library, dtype, value):
    values = np.ones([2, 10], np.float32)
    values[1, 7] = value
    with pytest.raises(EngineError, match="finite") as error:
        library.pack(values, dtype)
    assert error.value.status == INVALID


@pytest.mark.parametrize(
    ("dtype", "rows", "columns"),
    [
        *[(13, 2, 2), (INT8, 0, 5), (INT8, 5, -1), (-1, 1, 1)],
        # Each dimension is allowed, but a matrix has at most 2^58 values, with padding.
        *[(FLOAT32, 1 << 31, (1 << 30) + 1), (INT8, 1 << 31, (1 << 30) + 1)],
    ],
)
def test_impossible_sizes(library, dtype, rows, columns):
    assert library.dll.qvl_packed_bytes(dtype, rows, columns) == 0
    values = np.zeros(64, np.float32)
    with pytest.raises(EngineError, match="cannot be stored"):
        library.call("qvl_pack", dtype, rows, columns, pointer(values), pointer(values), 8)


def test_the_largest_size(library):
    assert library.dll.qvl_packed_bytes(FLOAT32, 1 << 31, 1 << 27) == 1 << 60


def test_wrong_length(library):
    values = np.zeros(64, np.float32)
    with pytest.raises(EngineError, match="packed_bytes is 8; it must be 132"):
        library.call("qvl_pack", INT8, 1, 64, pointer(values), pointer(values), 8)
