"""Intersection over union of boxes."""

from __future__ import annotations

from collections.abc import Iterable

Corners = tuple[float, float, float, float]
"""Left, top, right, bottom, in any unit."""

IOU = 0.5
"""Minimum intersection over union of a correct box."""


def bounds(points: Iterable[tuple[float, float]]) -> Corners:
    """The smallest box around the points, which are the corners of a box or a quad."""
    xs, ys = zip(*points)
    return min(xs), min(ys), max(xs), max(ys)


def iou(a: Corners, b: Corners) -> float:
    """Intersection over union, 0 to 1; 0 for empty boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(0, width) * max(0, height)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union else 0.0


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
