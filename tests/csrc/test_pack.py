"""Storage of quantised matrices: the layout that the header documents, and the size of the rounding."""

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


def by_the_header(packed, dtype, rows, columns):
    """Values of a packed matrix, decoded by the layout that qwenvl.h documents."""
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
    assert (library.unpack(packed, dtype, *shape) == by_the_header(packed, dtype, *shape)).all()


def group_parts(dtype, rows, columns):
    """Random integers, scales and zero points; the ends of both are among them."""
    groups = rows, -(-columns // GROUPS[dtype])
    random = np.random.default_rng(17)
    integers = random.integers(0, 16 if dtype in UINT4 else 256, [rows, columns], np.uint8)
    scales = random.standard_normal(groups).astype(np.float16)
    return integers, scales, random.choice([0, 1, 7, 16, 128, 255, 256], groups).astype(np.float16)


@pytest.mark.parametrize("dtype", GROUPS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 128), (2, 300), (4, 1000)])
def test_groups(library, dtype, shape):
    """The integers, scales and zero points are laid out as in qwenvl.h; padding is zero; their values are exact."""
    rows, columns = shape
    integers, scales, zeros = group_parts(dtype, *shape)
    packed = library.pack_groups(integers, scales, zeros, dtype)
    padded, group = -(-columns // 128) * 128, GROUPS[dtype]
    n_values = rows * padded // (2 if dtype in UINT4 else 1)
    stored = packed[:n_values].reshape(rows, -1)
    if dtype in UINT4:
        words = stored.view("<u2").reshape(rows, padded // 128, 1, 32)
        stored = (words >> np.array([0, 4, 8, 12], np.uint16).reshape(4, 1) & 15).reshape(rows, padded)
    parts = packed[n_values:].view(np.float16).reshape(2, rows, padded // group)
    assert len(packed) == n_values + 4 * rows * padded // group
    for found, given in ((stored, integers), (parts[0], scales), (parts[1], zeros)):
        assert (found[:, : given.shape[1]] == given).all()
        assert not found[:, given.shape[1] :].any()
    of_column = np.arange(columns) // group
    expected = scales.astype(np.float64)[:, of_column] * (integers - zeros.astype(np.float64)[:, of_column])
    assert (library.unpack(packed, dtype, *shape) == expected).all()


@pytest.mark.parametrize(
    ("part", "value", "message"),
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
def test_groups_out_of_range(library, part, value, message):
    parts = group_parts(UINT4_G32, 3, 70)
    parts[part][2, 1] = value
    with pytest.raises(EngineError, match=message) as error:
        library.pack_groups(*parts, UINT4_G32)
    assert error.value.status == INVALID


def test_types_of_the_other_function(library):
    zeros = np.zeros([1, 128], np.float32)
    for dtype, name, message in (
        (UINT8_G128, "qvl_pack", "dtype 11: use qvl_pack_groups"),
        (INT32, "qvl_pack", "a .1, 1. matrix of dtype 12 cannot be stored"),
    ):
        n_bytes = library.dll.qvl_packed_bytes(dtype, 1, 128 if dtype != INT32 else 1)
        with pytest.raises(EngineError, match=message):
            library.call(
                name, dtype, 1, 128 if dtype != INT32 else 1, pointer(zeros), pointer(zeros), n_bytes
            )
    with pytest.raises(EngineError, match="dtype 3 has no groups with zero points"):
        library.pack_groups(*group_parts(UINT4_G64, 1, 128), INT4_G64)
    assert [library.dll.qvl_packed_bytes(INT32, n, m) for n, m in ((5, 1), (5, 2))] == [20, 0]


@pytest.mark.parametrize(("dtype", "steps"), [(INT8, 254), (INT4_G64, 16), (INT4_G128, 16)])
def test_rounding(library, dtype, steps):
    """At most half a step, and for int4 up to two at the ends, which may be clipped."""
    values = RANDOM.standard_normal([16, 512]).astype(np.float32)
    error = np.abs(library.unpack(library.pack(values, dtype), dtype, 16, 512) - values)
    group = {INT8: 512, INT4_G64: 64, INT4_G128: 128}[dtype]
    largest = np.abs(values.reshape(16, -1, group)).max(-1, keepdims=True)
    step = 2 * largest / steps
    share = (error.reshape(16, -1, group) / step).max()
    assert share <= (0.501 if dtype == INT8 else 1.92)
    # Evenly spread over a step, the rounding has a deviation of 0.29 of it.
    assert (error.reshape(16, -1, group) / step).std() < 0.2


@pytest.mark.parametrize(("dtype", "group"), [(INT4_G64, 64), (INT4_G128, 128)])
def test_scales_of_least_error(library, dtype, group):
    """No group has a larger error than with the scale that maps its extreme to -8; the total error is smaller."""
    values = RANDOM.standard_normal([16, 512]).astype(np.float32)
    groups = values.reshape(-1, group).astype(np.float64)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    step = extreme / -8
    plain = ((np.clip(np.rint(groups / step), -8, 7) * step - groups) ** 2).sum(1)
    found = library.unpack(library.pack(values, dtype), dtype, 16, 512).reshape(-1, group)
    error = ((found - groups) ** 2).sum(1)
    assert (error <= 1.02 * plain).all()  # bfloat16 scales
    assert error.sum() < 0.93 * plain.sum()


def test_exact_values(library):
    values = RANDOM.standard_normal([3, 50]).astype(np.float32)
    assert (library.unpack(library.pack(values, FLOAT32), FLOAT32, 3, 50) == values).all()
    zero = np.zeros([2, 130], np.float32)
    for dtype in range(6):
        assert (library.unpack(library.pack(zero, dtype), dtype, 2, 130) == 0).all()
    halves = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert (library.unpack(library.pack(halves, BFLOAT16), BFLOAT16, 3, 50) == halves).all()


def test_float16(library):
    """Every value, and rounding as in NumPy, across the whole range."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(16, -1)
    every = np.where(np.isnan(every), np.float16(1), every)
    bits = np.ascontiguousarray(every).view(np.uint8).ravel()
    assert (library.unpack(bits, FLOAT16, *every.shape) == every).all()
    scales = np.exp2(RANDOM.uniform(-27, 17, [50, 77]))
    values = (RANDOM.standard_normal([50, 77]) * scales).astype(np.float32)
    ties = (every[:, :-1].astype(np.float32) + every[:, 1:].astype(np.float32)) / 2
    for source in (values, ties[np.isfinite(ties).all(1)]):
        with np.errstate(over="ignore"):
            expected = source.astype(np.float16).view(np.uint16)
        packed = library.pack(np.ascontiguousarray(source), FLOAT16)
        assert (packed.view(np.uint16).reshape(source.shape) == expected).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [INT8, INT4_G64])
def test_not_a_number(library, dtype, bad):
    values = np.ones([2, 10], np.float32)
    values[1, 7] = bad
    with pytest.raises(EngineError, match="finite") as error:
        library.pack(values, dtype)
    assert error.value.status == INVALID


@pytest.mark.parametrize(("dtype", "rows", "columns"), [(13, 2, 2), (INT8, 0, 5), (INT8, 5, -1), (-1, 1, 1)])
def test_impossible_sizes(library, dtype, rows, columns):
    assert library.dll.qvl_packed_bytes(dtype, rows, columns) == 0
    values = np.zeros(64, np.float32)
    with pytest.raises(EngineError, match="cannot be stored"):
        library.call("qvl_pack", dtype, rows, columns, pointer(values), pointer(values), 8)


def test_wrong_length(library):
    values = np.zeros(64, np.float32)
    with pytest.raises(EngineError, match="packed_bytes is 8; it must be 132"):
        library.call("qvl_pack", INT8, 1, 64, pointer(values), pointer(values), 8)
