"""Text metrics in Pillow's built-in font, which needs no font file."""

from __future__ import annotations

from functools import cache
from typing import Any

from PIL import ImageFont

# Font size at which text is measured, in pixels, and stroke width as a share of the font size.
_MEASURED_SIZE = 200
_STROKE_SHARE = 0.025


@cache
def font(pixels: int) -> Any:
    """Load Pillow's built-in scalable font at a size in pixels. Needs FreeType, which Pillow's wheels include."""
    return ImageFont.load_default(pixels)


def stroke(pixels: float) -> int:
    """Stroke width in pixels for a font size: bold letters stay readable in a small image."""
    return max(1, round(pixels * _STROKE_SHARE))


@cache
def text_bounds(text: str) -> tuple[float, float, float, float]:
    """Bounding box (left, top, right, bottom) at font size 1, from the text origin.

    It includes the space left of the first letter and right of the last.
    """
    left, top, right, bottom = font(_MEASURED_SIZE).getbbox(text, stroke_width=stroke(_MEASURED_SIZE))
    return left / _MEASURED_SIZE, top / _MEASURED_SIZE, right / _MEASURED_SIZE, bottom / _MEASURED_SIZE


def text_corners(text: str, size: float) -> list[tuple[float, float]]:
    """Corners of the bounding rectangle of `text` at font size `size`, centred on the origin."""
    left, top, right, bottom = text_bounds(text)
    x, y = (right - left) / 2 * size, (bottom - top) / 2 * size
    return [(-x, -y), (x, -y), (x, y), (-x, y)]
