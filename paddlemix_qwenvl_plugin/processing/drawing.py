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

# Font files on common systems: first those with Chinese, Japanese and Korean glyphs, then those without.
_SYSTEM_FONTS = (
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
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "Arial.ttf",
)

# A code point that is no character: each font draws its missing-glyph sign, in most fonts an empty box.
_NO_CHARACTER = "\U0010ffff"
# Font size in pixels at which glyphs are compared with the missing-glyph sign.
_COMPARED_SIZE = 20

# The EXIF tag Software and its value in images with drawn boxes.
_SOFTWARE_TAG, _SOFTWARE = 0x0131, "qwenvl"

Font = Union[ImageFont.FreeTypeFont, ImageFont.ImageFont]


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Draw the outlines of `boxes`, with their refs as labels, on an RGB copy of `image`.

    A label has a background of the box's colour. It is above the box if there is room, and always inside the image; a
    label that is too wide is truncated, and omitted if no letter fits. Its font is that of `font_for`; characters that
    the font lacks appear as its missing-glyph sign, in most fonts an empty box.
    """
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn)
    width, height = drawn.size
    # In proportion to the shorter side, but letters are not higher than the image.
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
    """Whether a file has the mark of `save_drawn`; `qwenvl predict --draw` replaces no other file that has content."""
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
    """Choose a font of `size` pixels for `text`: the first that has all its characters, else the one that has most.

    The first font is Pillow's built-in one, which has ASCII, typographic quotes and a few signs, but no letters with
    accents. The others are fonts of the system.
    """
    font = _load(_choose(text)[0], size)
    assert font is not None  # _choose selects an existing font
    return font


def can_draw(text: str) -> bool:
    """Whether the built-in font, or a font of this system, has all characters of `text`."""
    return _choose(text)[1] == 0


def _choose(text: str) -> tuple[Optional[str], int]:
    """Choose a font: its file name, None for the built-in font, and the number of characters that it lacks."""
    characters = set("".join(text.split()))  # white space is drawn as a space, which all fonts have
    chosen, fewest = None, sum(not _has_glyph(None, character) for character in characters)
    for name in _SYSTEM_FONTS:
        if fewest == 0:
            break
        if _load(name, _COMPARED_SIZE) is not None:
            n_missing = sum(not _has_glyph(name, character) for character in characters)
            if n_missing < fewest:
                chosen, fewest = name, n_missing
    return chosen, fewest


@lru_cache(maxsize=4096)
def _has_glyph(name: Optional[str], character: str) -> bool:
    """Whether font `name`, which must exist, draws a character as something else than its missing-glyph sign."""
    font = _load(name, _COMPARED_SIZE)
    assert font is not None
    glyph, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return bool(glyph.size != missing.size or bytes(glyph) != bytes(missing))


@lru_cache(maxsize=128)
def _load(name: Optional[str], size: int) -> Optional[Font]:
    """Load a font of the system, None if it does not exist; for the name None, the built-in font."""
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # not on this system
        return None
