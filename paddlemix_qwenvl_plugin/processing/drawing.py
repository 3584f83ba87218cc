"""Draw boxes with their labels on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Optional, Union

from PIL import Image, ImageDraw, ImageFont

from paddlemix_qwenvl_plugin.processing.boxes import Box

# One box after the other. Far apart in hue, and all dark enough for white letters.
COLOURS = ("#c8102e", "#1b7a34", "#2b50d8", "#a84300", "#7b1fa2", "#00707a", "#b8176f", "#6b6000")

# Fonts with Chinese, Japanese and Korean glyphs, as the common systems name their files.
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

# The built-in font ends with the Latin letters.
_LAST_LATIN = 0x24F

# The EXIF tag for the program that made a picture, and what is written there.
_SOFTWARE, _NAME = 0x0131, "qwenvl"

Font = Union[ImageFont.FreeTypeFont, ImageFont.ImageFont]


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of `image` (RGB) with the outlines of `boxes` and their refs as labels.

    A label stands on a filled patch of the box's colour, above the box if there is room, and always inside
    the picture; a label that is too wide is cut short. Labels that need Chinese glyphs use a font of the
    system; without one they show as empty squares.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width, height = drawn.size
    line = max(2, round(min(width, height) / 200))
    font_size = min(max(12, min(width, height) // 28), max(height - 2, 1))
    for index, box in enumerate(boxes):
        colour = COLOURS[index % len(COLOURS)]
        corners = [(min(x, width - 1), min(y, height - 1)) for x, y in box.to_pixels(width, height)]
        if box.kind == "box":
            draw.rectangle((*corners[0], *corners[1]), outline=colour, width=line)
        else:
            draw.line([*corners, corners[0]], fill=colour, width=line)
        if box.ref:
            left, top = min(x for x, _ in corners), min(y for _, y in corners)
            _draw_label(draw, (width, height), (left, top), box.ref, colour, font_size)
    return drawn


def save_drawn(drawn: Image.Image, path: Path) -> None:
    """Write a picture, in the format of the suffix, for `is_drawn` to know. BMP and GIF have no place for that."""
    exif = Image.Exif()
    exif[_SOFTWARE] = _NAME
    drawn.save(path, exif=exif)


def is_drawn(path: Path) -> bool:
    """Whether `save_drawn` wrote this file."""
    try:
        with Image.open(path) as picture:
            return bool(picture.getexif().get(_SOFTWARE) == _NAME)
    except Exception:  # no picture, or a damaged one: Pillow's plugins have no common error
        return False


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    label: str,
    colour: str,
    font_size: int,
) -> None:
    width, height = size
    padding = 2
    label = " ".join(label.split())  # one line
    font = font_for(label, font_size)
    label = _fit(draw, label, font, width - 2 * padding)
    if not label:
        return
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    patch_width, patch_height = right - left + 2 * padding, bottom - top + 2 * padding
    x = min(max(corner[0], 0), width - patch_width)
    above = corner[1] - patch_height
    y = min(above if above >= 0 else corner[1], height - patch_height)
    if x < 0 or y < 0:  # the picture is smaller than the letters
        return
    draw.rectangle((x, y, x + patch_width - 1, y + patch_height - 1), fill=colour)
    draw.text((x + padding - left, y + padding - top), label, fill="white", font=font)


def _fit(draw: ImageDraw.ImageDraw, label: str, font: Font, room: float) -> str:
    """`label`, cut short with an ellipsis until it is at most `room` pixels wide; "" if nothing fits."""
    if len(label) <= room and draw.textlength(label, font=font) <= room:
        return label
    label = label[: max(0, int(room))]  # a letter takes at least a pixel
    while label:
        length = draw.textlength(label + "…", font=font)
        if length <= room:
            return label + "…"
        label = label[: min(len(label) - 1, int(len(label) * room / length))]
    return ""


def font_for(text: str, size: int) -> Font:
    """A font of `size` pixels for `text`; see can_draw."""
    return (None if _is_latin(text) else _cjk_font(size)) or _latin_font(size)


def can_draw(text: str) -> bool:
    """Whether `text` is Latin, or this system has a font with Chinese glyphs: without one they are empty squares."""
    return _is_latin(text) or _cjk_font(12) is not None


def _is_latin(text: str) -> bool:
    return all(ord(c) <= _LAST_LATIN for c in text)


@lru_cache(maxsize=32)
def _latin_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=32)
def _cjk_font(size: int) -> Optional[Font]:
    for name in _CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this system: the next one
            continue
    return None
