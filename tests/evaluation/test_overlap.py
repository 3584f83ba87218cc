"""Intersection over union compared with counted pixels."""

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


def pixels(box: Corners) -> np.ndarray:
    plane = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = (int(value) for value in box)
    plane[top:bottom, left:right] = True
    return plane


@given(boxes(), boxes())
def test_iou_counts_pixels(a: Corners, b: Corners) -> None:
    union = (pixels(a) | pixels(b)).sum()
    expected = (pixels(a) & pixels(b)).sum() / union if union else 0.0
    assert iou(a, b) == pytest.approx(expected)
    assert iou(b, a) == iou(a, b)


def test_half() -> None:
    assert iou((0, 0, 10, 10), (0, 0, 10, 20)) == 0.5
