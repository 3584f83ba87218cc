"""Intersection over union of boxes, compared with a count of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.evaluation.overlap import Corners, iou

SIDE = 12


@st.composite
def boxes(draw: st.DrawFn) -> Corners:
    """Random box with integer coordinates, possibly empty."""
    left, right = sorted(draw(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE))))
    top, bottom = sorted(draw(st.tuples(st.integers(0, SIDE), st.integers(0, SIDE))))
    return left, top, right, bottom


def mask(box: Corners) -> np.ndarray:
    """Mask of the pixels in a box, bool [SIDE, SIDE]."""
    pixels = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = (int(value) for value in box)
    pixels[top:bottom, left:right] = True
    return pixels


@given(boxes(), boxes())
def test_iou_agrees_with_a_count_of_pixels(a: Corners, b: Corners) -> None:
    union = (mask(a) | mask(b)).sum()
    expected = (mask(a) & mask(b)).sum() / union if union else 0.0
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == iou(a, b)


def test_iou_of_a_box_and_its_half() -> None:
    assert iou((0, 0, 10, 10), (0, 0, 10, 20)) == 0.5
