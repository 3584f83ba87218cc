"""Text metrics in Pillow's built-in font, which needs no font file."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import ImageFont

_MEASURED_AT = 200
_STROKE = 0.025


@cache
def font(pixels: int) -> Any:
    """Load Pillow's built-in scalable font at a size in pixels. Needs FreeType, which Pillow's wheels include."""
    return ImageFont.load_default(pixels)


def stroke(pixels: float) -> int:
    """Stroke width in pixels for a font size: bold letters stay readable in a small image."""
    return max(1, round(pixels * _STROKE))


@cache
def ink(text: str) -> tuple[float, float, float, float]:
    """Bounding box (left, top, right, bottom) at font size 1, from the pen's origin, outer letter spacing included."""
    left, top, right, bottom = font(_MEASURED_AT).getbbox(text, stroke_width=stroke(_MEASURED_AT))
    return left / _MEASURED_AT, top / _MEASURED_AT, right / _MEASURED_AT, bottom / _MEASURED_AT


def text_corners(text: str, size: float) -> list[tuple[float, float]]:
    """Corners of the bounding rectangle of `text` at font size `size`, centred on the origin."""
    left, top, right, bottom = ink(text)
    x, y = (right - left) / 2 * size, (bottom - top) / 2 * size
    return [(-x, -y), (x, -y), (x, y), (-x, y)]
