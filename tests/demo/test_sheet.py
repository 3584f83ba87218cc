"""The demo's contact sheet: positions of images and boxes, wrapping of text, wrong answers, missing fonts."""

from __future__ import annotations

import numpy as np
import pytest
from demo_helpers import make_answer, question_named
from PIL import Image, ImageColor

from paddlemix_qwenvl_plugin.demo import sheet
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.demo.sheet import GAP, SIDE, contact_sheet
from paddlemix_qwenvl_plugin.processing import drawing

STEP = SIDE + GAP
# Left edges of the three images in a row.
LEFT = (GAP, GAP + STEP, GAP + 2 * STEP)


def has_box(image: Image.Image, box: tuple[int, int, int, int], colour: str) -> bool:
    """Whether points on the left, right and lower side of a box have its colour.

    The upper side may be hidden by the box's label, a part of the lower side by the label of another box.
    """
    pixels = np.asarray(image, np.int16)
    left, top, right, bottom = box
    y = (top + 3 * bottom) // 4
    points = [(left, y), (right - 1, y), ((3 * left + right) // 4, bottom - 1)]
    rgb = ImageColor.getrgb(colour)
    return all((np.abs(pixels[y - 1 : y + 2, x - 1 : x + 2] - rgb).max(axis=2) == 0).any() for x, y in points)


def test_boxes_are_around_their_objects(all_correct_run: Run) -> None:
    image = contact_sheet(all_correct_run.results)
    assert image.width == GAP + 3 * STEP
    # The second image of the first row, with the boxes of its scene.
    scene = all_correct_run.results[1].question.sample.scenes[0]
    assert len(scene.things) == 3
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = (round(value * SIDE / 1000) for value in thing.box)
        box = (LEFT[1] + left, GAP + top, LEFT[1] + right, GAP + bottom)
        assert has_box(image, box, drawing.COLOURS[number]), thing
        # There is none at the same position of the first image.
        box_on_first_image = (LEFT[0] + left, GAP + top, LEFT[0] + right, GAP + bottom)
        assert not has_box(image, box_on_first_image, drawing.COLOURS[number])


def test_the_first_image_is_on_the_sheet(all_correct_run: Run) -> None:
    image = contact_sheet(all_correct_run.results)
    with Image.open(all_correct_run.results[0].question.images[0]) as source:
        expected = np.asarray(source.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    assert (np.asarray(image)[GAP : GAP + SIDE, GAP : GAP + SIDE] == expected).all()


def test_two_images_are_side_by_side_with_boxes_on_the_second() -> None:
    result = Result(question_named("pair"), make_answer("<box>(0,500),(900,1000)</box>"))
    image = contact_sheet([result])
    for image_left, has_boxes in ((LEFT[0], False), (LEFT[1], True)):
        box = (image_left, GAP + SIDE // 2, image_left + round(0.9 * SIDE), GAP + SIDE)
        assert has_box(image, box, drawing.COLOURS[0]) is has_boxes


@pytest.mark.parametrize("text", ["", "word " * 40, "x" * 400, "一个小的橙色心形" * 20, "a\nb\tc"])
def test_text_stays_in_its_column(text: str, all_correct_run: Run) -> None:
    """The gaps between columns and the edges are white, and the last line is inside the sheet."""
    results = [
        Result(question_named("count"), make_answer(text)),
        all_correct_run.results[0],
        all_correct_run.results[2],
    ]
    text_pixels = np.asarray(contact_sheet(results))[2 * GAP + SIDE :]
    tolerance = 2  # pixels of a letter outside its column
    assert (text_pixels[:, : GAP - tolerance] == 255).all()
    for left in LEFT[1:]:
        assert (text_pixels[:, left - GAP + tolerance : left - tolerance] == 255).all()
    assert (text_pixels[:, -GAP + tolerance :] == 255).all()
    assert (text_pixels[-2:] == 255).all()
    assert (text_pixels != 255).any()


def test_a_wrong_answer_is_marked_in_red(all_correct_run: Run) -> None:
    red = ImageColor.getrgb(sheet._WRONG)
    right = contact_sheet(all_correct_run.results[:1])
    wrong = contact_sheet([Result(all_correct_run.results[0].question, make_answer("Nothing."))])
    assert not (np.asarray(right)[GAP + SIDE :] == red).all(axis=2).any()
    assert (np.asarray(wrong)[GAP + SIDE :] == red).all(axis=2).any()


def test_without_a_chinese_font(all_correct_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Chinese text with missing glyphs: boxes without labels, and a line that refers to the page."""
    monkeypatch.setattr(drawing, "_SYSTEM_FONTS", ("no-such-font.ttf",))
    chinese = all_correct_run.results[-1]
    assert {box.ref for box in chinese.answer.boxes} != {None}
    assert {sheet._labelled(box).ref for box in chinese.answer.boxes} == {None}
    lines = [line for _, line in sheet._text(chinese)]
    # In place of the question and of the answer; the last line is the verdict.
    assert lines[:-1] == 2 * sheet._wrapped(sheet._NO_FONT, SIDE)
    assert contact_sheet([chinese]).size[0] == GAP + 3 * STEP
