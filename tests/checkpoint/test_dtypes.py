"""Rounding between weight types, against Paddle's casts and Python's struct."""

from __future__ import annotations

import struct

import numpy as np
import paddle
import pytest

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast, to_float32


def samples():
    random = np.random.default_rng(3)
    # Beside others: two ties of bfloat16, the maximum of float16, and two numbers below its normal range.
    special = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 65504.0, 1e-8, -3e-5, np.pi]
    return np.concatenate([random.standard_normal(2000), special]).astype(np.float32)


def test_bfloat16_rounds_as_paddle_does():
    values = samples()
    expected = paddle.to_tensor(values).astype("bfloat16").astype("float32").numpy()
    np.testing.assert_array_equal(to_float32(cast(values, "float32", "bfloat16", "x"), "bfloat16"), expected)


def test_float16_rounds_to_nearest_even():
    values = samples()
    expected = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values]
    np.testing.assert_array_equal(cast(values, "float32", "float16", "x"), expected)


def test_bfloat16_keeps_nan_and_infinity():
    # Three NaNs, infinity and minus infinity. Rounding would carry into the sign of the first and beyond that of the
    # third; without its lower half, the second would be infinity.
    bits = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000], np.uint32)
    back = to_float32(cast(bits.view(np.float32), "float32", "bfloat16", "x"), "bfloat16")
    assert np.isnan(back[:3]).all()
    assert back[3:].tolist() == [np.inf, -np.inf]


def test_the_error_of_a_float16_overflow_names_the_tensor():
    with pytest.raises(QwenVLError, match=r"h\.3\.w: a value of 7e\+04 does not fit into float16"):
        cast(np.array([1.0, -70000.0], np.float32), "float32", "float16", "h.3.w")
