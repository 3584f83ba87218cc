"""`pack_groups` in engine/quantize.py, compared with the layout of quantized weights in csrc/include/qwenvl.h."""

from __future__ import annotations

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.engine.quantize import pack_groups, packed_bytes
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

NAME = "h.0.mlp.w1.weight"


def test_layout_of_eight_bits() -> None:
    """Rows of 130 values, padded to 256; then the scales, then the zero points, of 3 groups, padded to 4."""
    random = np.random.default_rng(0)
    integers = random.integers(0, 256, (3, 130), np.uint8)
    # 256 is the largest zero point of the layout.
    scales, zeros = random.random((3, 3)).astype(np.float16), np.full((3, 3), 256, np.float16)
    # [:, ::-1] makes a view that is not contiguous.
    packed = pack_groups("uint8_g64", integers[:, ::-1], scales, zeros, NAME)
    assert packed.nbytes == packed_bytes("uint8_g64", 3, 130) == 3 * (256 + 2 * 4 * 2)
    assert (packed[: 3 * 256].reshape(3, 256)[:, :130] == integers[:, ::-1]).all()
    groups = packed[3 * 256 :].view(np.float16).reshape(2, 3, 4)
    assert (groups[:, :, :3] == (scales, zeros)).all()
    assert not groups[:, :, 3].any()


def test_sizes() -> None:
    # A row of 300 values of 4 bits is padded to 384, 192 bytes; it has 3 scales and 3 zero points of 2 bytes each.
    assert packed_bytes("uint4_g128", 5, 300) == 5 * (192 + 2 * 3 * 2)
    assert packed_bytes("int32", 300) == 1200


def test_invalid_integers_and_zero_points() -> None:
    integers, ones = np.full((2, 32), 16, np.uint8), np.ones((2, 1), np.float16)
    with pytest.raises(QwenVLError, match=f"^{NAME}: integers: one of them is 16; 4 bits hold 0 to 15$"):
        pack_groups("uint4_g32", integers, ones, ones, NAME)
    with pytest.raises(QwenVLError, match=f"^{NAME}: zeros: one of them is 0.5"):
        pack_groups("uint8_g32", integers, ones, ones / np.float16(2), NAME)
