"""Draw labelled boxes on an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Optional, Union

from PIL import Image, ImageDraw, ImageFont

from paddlemix_qwenvl_plugin.processing.boxes import Box

# Colours of successive boxes: far apart in hue, and all dark enough for white letters.
COLOURS = ("#c8102e", "#1b7a34", "#2b50d8", "#a84300", "#7b1fa2", "#00707a", "#b8176f", "#6b6000")

# Font files with Chinese, Japanese and Korean glyphs on common systems.
_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "msyh.ttc",
    "simsun.ttc",
    "simhei.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
)

# Last code point of Pillow's built-in font, the end of Latin Extended-B.
_LAST_LATIN = 0x24F

# The EXIF tag Software and its value in images with drawn boxes.
_SOFTWARE_TAG, _SOFTWARE = 0x0131, "qwenvl"

Font = Union[ImageFont.FreeTypeFont, ImageFont.ImageFont]


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw the outlines of `boxes`, with their refs as labels, on an RGB copy of `image`.

    A label has a background of the box's colour. It is above the box if there is room, and always inside the image; a
    label that is too wide is truncated. A label that is not Latin uses a font of the system with Chinese glyphs;
    without one, its glyphs are empty squares.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width, height = drawn.size
    line_width = max(2, round(min(width, height) / 200))
    font_size = min(max(12, min(width, height) // 28), max(height - 2, 1))
    for index, box in enumerate(boxes):
        colour = COLOURS[index % len(COLOURS)]
        corners = [(min(x, width - 1), min(y, height - 1)) for x, y in box.to_pixels(width, height)]
        if box.kind == "box":
            draw.rectangle((*corners[0], *corners[1]), outline=colour, width=line_width)
        else:
            draw.line([*corners, corners[0]], fill=colour, width=line_width)
        if box.ref:
            left, top = min(x for x, _ in corners), min(y for _, y in corners)
            _draw_label(draw, (width, height), (left, top), box.ref, colour, font_size)
    return drawn


def save_drawn(drawn: Image.Image, path: Path) -> None:
    """Write a drawn image in the format of the suffix, marked for `is_drawn`; BMP and GIF cannot hold the mark."""
    exif = Image.Exif()
    exif[_SOFTWARE_TAG] = _SOFTWARE
    drawn.save(path, exif=exif)


def is_drawn(path: Path) -> bool:
    """Whether a file carries the mark of `save_drawn`."""
    try:
        with Image.open(path) as image:
            return bool(image.getexif().get(_SOFTWARE_TAG) == _SOFTWARE)
    except Exception:  # not an image, or damaged: the errors of Pillow's plugins have no common class
        return False


def _draw_label(
    draw: ImageDraw.ImageDraw,
    image_size: tuple[int, int],
    corner: tuple[float, float],
    label: str,
    colour: str,
    font_size: int,
) -> None:
    """Draw a label above a box whose top left corner is `corner`, or inside the box if there is no room above."""
    width, height = image_size
    padding = 2
    label = " ".join(label.split())  # one line
    font = font_for(label, font_size)
    label = _fit(draw, label, font, width - 2 * padding)
    if not label:
        return
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    label_width, label_height = right - left + 2 * padding, bottom - top + 2 * padding
    x = min(max(corner[0], 0), width - label_width)
    above = corner[1] - label_height
    y = min(above if above >= 0 else corner[1], height - label_height)
    if x < 0 or y < 0:  # the image is smaller than the letters
        return
    draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=colour)
    draw.text((x + padding - left, y + padding - top), label, fill="white", font=font)


def _fit(draw: ImageDraw.ImageDraw, label: str, font: Font, max_width: float) -> str:
    """Truncate `label` with an ellipsis to at most `max_width` pixels; "" if no letter fits."""
    if len(label) <= max_width and draw.textlength(label, font=font) <= max_width:
        return label
    label = label[: max(0, int(max_width))]  # a letter takes at least a pixel
    while label:
        length = draw.textlength(label + "…", font=font)
        if length <= max_width:
            return label + "…"
        label = label[: min(len(label) - 1, int(len(label) * max_width / length))]
    return ""


def font_for(text: str, size: int) -> Font:
    """Choose a font of `size` pixels for `text`: the built-in one for Latin text, else one with Chinese glyphs."""
    return (None if _is_latin(text) else _cjk_font(size)) or _latin_font(size)


def can_draw(text: str) -> bool:
    """Whether `text` is Latin, or this system has a font with Chinese glyphs."""
    return _is_latin(text) or _cjk_font(12) is not None


def _is_latin(text: str) -> bool:
    return all(ord(character) <= _LAST_LATIN for character in text)


@lru_cache(maxsize=32)
def _latin_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=32)
def _cjk_font(size: int) -> Optional[Font]:
    for name in _CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue
    return None
