"""Words in Pillow's built-in font, which needs no font file."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import ImageFont

_MEASURED_AT = 200
_STROKE = 0.025


@cache
def font(pixels: int) -> Any:
    """Pillow's own scalable font at a size in pixels; Pillow must be built with FreeType, as its wheels are."""
    return ImageFont.load_default(pixels)


def stroke(pixels: float) -> int:
    """How many pixels letters of a size are widened by on each side: bold letters survive a small picture."""
    return max(1, round(pixels * _STROKE))


@cache
def ink(text: str) -> tuple[float, float, float, float]:
    """Left, top, right, bottom for font size 1, from the pen's origin: the ink and the outer letters' spacing."""
    left, top, right, bottom = font(_MEASURED_AT).getbbox(text, stroke_width=stroke(_MEASURED_AT))
    return left / _MEASURED_AT, top / _MEASURED_AT, right / _MEASURED_AT, bottom / _MEASURED_AT


def text_corners(text: str, size: float) -> list[tuple[float, float]]:
    """Corners of the rectangle around `text` in font size `size`, centred on the origin."""
    left, top, right, bottom = ink(text)
    x, y = (right - left) / 2 * size, (bottom - top) / 2 * size
    return [(-x, -y), (x, -y), (x, y), (-x, y)]
