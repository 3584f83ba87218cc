"""Boxes drawn on images: outlines, labels, colours and fonts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from paddlemix_qwenvl_plugin.processing import drawing
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.processing.drawing import can_draw, draw_boxes, font_for

BOX = Box("box", ((250, 250), (750, 750)))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:  # type: ignore[type-arg]
    """The pixels that differ, bool [H, W]."""
    difference = np.asarray(before.convert("RGB")) != np.asarray(after)
    return difference.any(axis=2)


def luminance(colour: str) -> float:
    """Relative luminance by WCAG: the weighted sum of the sRGB channels in linear light."""
    channels = [value / 255 for value in ImageColor.getrgb(colour)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_position_of_the_outline() -> None:
    image = Image.new("RGB", (400, 200), "gray")
    mask = changed(image, draw_boxes(image, [BOX]))
    rows, columns = np.nonzero(mask)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 300, 50, 150)
    assert not mask[60:140, 110:290].any()


def test_a_box_of_the_whole_image_is_visible_on_all_sides() -> None:
    image = Image.new("RGB", (40, 20), "gray")
    mask = changed(image, draw_boxes(image, [Box("box", ((0, 0), (1000, 1000)))]))
    assert mask[[0, -1]].all()
    assert mask[:, [0, -1]].all()


def test_quad_outline() -> None:
    image = Image.new("RGB", (200, 200), "gray")
    diamond = Box("quad", ((500, 100), (900, 500), (500, 900), (100, 500)))
    mask = changed(image, draw_boxes(image, [diamond]))
    # The corners and the middle of each side, within two pixels.
    for x, y in [(100, 20), (180, 100), (100, 180), (20, 100), (140, 60), (140, 140), (60, 140), (60, 60)]:
        assert mask[y - 2 : y + 3, x - 2 : x + 3].any()
    assert not mask[80:120, 80:120].any()
    assert not mask[20, 20]


def test_the_given_image_is_unchanged() -> None:
    image = Image.new("RGB", (100, 100), "gray")
    draw_boxes(image, [BOX])
    assert image.getcolors() == [(10000, (128, 128, 128))]


@pytest.mark.parametrize("points", [((0, 0), (1000, 1000)), ((990, 990), (1000, 1000)), ((0, 0), (5, 5))])
@pytest.mark.parametrize("ref", ["dog", "a very long label " * 20, "海滩上的狗"])
def test_a_label_is_completely_inside_the_image(points: tuple, ref: str) -> None:  # type: ignore[type-arg]
    image = Image.new("RGB", (300, 200), "gray")
    with_label = draw_boxes(image, [Box("box", points, ref)])
    mask = changed(draw_boxes(image, [Box("box", points)]), with_label)
    rows, columns = np.nonzero(mask)
    # A label has a border without letters on all sides. If it were cut off, letters would touch the edge of the image.
    letters = (np.asarray(with_label) > 200).all(axis=2)
    assert letters.any()
    assert not letters[[0, -1]].any()
    assert not letters[:, [0, -1]].any()
    assert rows.max() - rows.min() >= 8
    assert columns.max() - columns.min() >= 10


def test_labels_are_readable_on_any_background() -> None:
    for background in ("white", "black", "gray"):
        image = Image.new("RGB", (300, 200), background)
        drawn = np.asarray(draw_boxes(image, [Box("box", ((300, 300), (900, 900)), "dog")]))
        colour = np.array(ImageColor.getrgb(drawing.COLOURS[0]))
        # The box begins at row 60; above it, only the background of the label has its colour.
        label = (drawn == colour).all(axis=2)[:59]
        assert label.sum() > 150
    # 4.5 is the contrast that WCAG requires for small text, here white letters (luminance 1).
    assert all(1.05 / (luminance(colour) + 0.05) >= 4.5 for colour in drawing.COLOURS)
    assert len(set(drawing.COLOURS)) == len(drawing.COLOURS)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (20, 12), (5000, 40)])
@pytest.mark.parametrize("ref", ["x", "海滩上的狗", "\ud800 \x00\n\t👩‍👧", "w" * 20_000])
def test_any_size_and_any_label(size: tuple[int, int], ref: str) -> None:
    image = Image.new("L", size)
    # Twelve boxes, more than there are colours.
    boxes = [Box("box", ((0, 0), (1000, 1000)), ref), Box("quad", ((0, 0),) * 4, ref)] * 6
    assert draw_boxes(image, boxes).size == size


# (text, whether Pillow's built-in font has all its characters)
TEXTS = [
    ("a dog, 5°", True),
    ("a long label…", True),
    ("“so-called”\n\u00a0dog’s", True),
    ("café", False),
    ("grün, weiß", False),
    ("狗", False),
]


@pytest.mark.parametrize(("text", "is_built_in"), TEXTS)
def test_text_without_fonts_of_the_system(
    text: str, is_built_in: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", ("no-such-font.ttf",))
    assert can_draw(text) is is_built_in
    assert font_for(text, 20).getname() == ImageFont.load_default(20).getname()
    image = Image.new("RGB", (300, 200))
    assert changed(image, draw_boxes(image, [Box("box", ((300, 300), (900, 900)), text)])).any()


@pytest.mark.parametrize(("text", "is_built_in"), TEXTS[:-1])
def test_letters_with_accents_use_a_font_of_the_system(
    text: str, is_built_in: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        system = ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("needs the font DejaVu Sans")
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", ("no-such-font.ttf", "DejaVuSans.ttf"))
    assert can_draw(text)
    assert not can_draw(text + "狗")  # DejaVu Sans has no Chinese glyphs
    expected = ImageFont.load_default(20) if is_built_in else system
    for label in (text, text + "狗"):
        font = font_for(label, 20)
        assert font.getname() == expected.getname()
        assert font.size == 20
