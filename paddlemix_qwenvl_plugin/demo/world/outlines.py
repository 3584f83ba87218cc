"""Shape outlines as polygons of roughly radius 1 around the origin, y downwards."""

from __future__ import annotations

import math
from functools import cache

Points = list[tuple[float, float]]


@cache
def outline(kind: str) -> Points:
    """Polygon of a shape of `names.SHAPES`."""
    if kind == "circle":
        return _regular(48)
    if kind == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if kind == "triangle":
        return [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
    if kind == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if kind == "star":
        return [
            (radius * math.sin(i * math.pi / 5), -radius * math.cos(i * math.pi / 5))
            for i, radius in enumerate([1.0, 0.42] * 5)
        ]
    if kind == "cross":
        a, b = 0.95, 0.32
        quarter = [(b, -a), (b, -b), (a, -b)]
        return [_quarter_turns(point, times) for times in range(4) for point in quarter]
    if kind == "heart":
        return _heart(48)
    raise AssertionError(kind)


def _quarter_turns(point: tuple[float, float], times: int) -> tuple[float, float]:
    x, y = point
    return ((x, y), (-y, x), (-x, -y), (y, -x))[times]


def _regular(n_points: int) -> Points:
    angles = [2 * math.pi * i / n_points for i in range(n_points)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def _heart(n_points: int) -> Points:
    """Heart curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, centred and scaled to about radius 1."""
    points = []
    for i in range(n_points):
        t = 2 * math.pi * i / n_points
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 17, -(y + 2.5) / 17))
    return points
