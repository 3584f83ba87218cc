"""Contact sheet: positions of boxes, wrapping of text."""

from __future__ import annotations

import numpy as np
import pytest
from demo_helpers import answered, named
from PIL import Image, ImageColor

from paddlemix_qwenvl_plugin.demo import sheet
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.demo.sheet import GAP, SIDE, contact_sheet
from paddlemix_qwenvl_plugin.processing import drawing

STEP = SIDE + GAP
# Left edges of the images of a row.
LEFT = (GAP, GAP + STEP, GAP + 2 * STEP)


def sides_are(image: Image.Image, box: tuple[int, int, int, int], colour: str) -> bool:
    """Whether spots on a box's sides have its colour; labels may hide its upper edge, and another's its lower one."""
    pixels = np.asarray(image, np.int16)
    left, top, right, bottom = box
    y = (top + 3 * bottom) // 4
    spots = [(left, y), (right - 1, y), ((3 * left + right) // 4, bottom - 1)]
    wanted = ImageColor.getrgb(colour)
    return all(
        (np.abs(pixels[y - 1 : y + 2, x - 1 : x + 2] - wanted).max(axis=2) == 0).any() for x, y in spots
    )


def test_boxes_are_over_their_objects(all_correct_run: Run) -> None:
    image = contact_sheet(all_correct_run.results)
    assert image.width == GAP + 3 * STEP
    # The second image of the first row, with the boxes of its scene.
    scene = all_correct_run.results[1].question.sample.scenes[0]
    assert len(scene.things) == 3
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = (round(value * SIDE / 1000) for value in thing.box)
        place = (LEFT[1] + left, GAP + top, LEFT[1] + right, GAP + bottom)
        assert sides_are(image, place, drawing.COLOURS[number]), thing
        # And nowhere else.
        moved = (place[0] - STEP, place[1], place[2] - STEP, place[3])
        assert not sides_are(image, moved, drawing.COLOURS[number])


def test_images_are_on_it(all_correct_run: Run) -> None:
    image = contact_sheet(all_correct_run.results)
    with Image.open(all_correct_run.results[0].question.images[0]) as source:
        wanted = np.asarray(source.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    assert (np.asarray(image)[GAP : GAP + SIDE, GAP : GAP + SIDE] == wanted).all()


def test_the_pair_is_side_by_side_with_boxes_on_the_second() -> None:
    pair = Result(named("pair"), answered("<box>(0,500),(900,1000)</box>"))
    image = contact_sheet([pair])
    place = [0, SIDE // 2, round(0.9 * SIDE), SIDE]
    for left, there in ((LEFT[0], False), (LEFT[1], True)):
        box = (left + place[0], GAP + place[1], left + place[2], GAP + place[3])
        assert sides_are(image, box, drawing.COLOURS[0]) is there


@pytest.mark.parametrize("text", ["", "word " * 40, "x" * 400, "一个小的橙色心形" * 20, "a\nb\tc"])
def test_words_stay_in_their_column(text: str, all_correct_run: Run) -> None:
    """The gaps and edges are white, and the last line is inside the sheet."""
    results = [Result(named("count"), answered(text)), all_correct_run.results[0], all_correct_run.results[2]]
    pixels = np.asarray(contact_sheet(results))[2 * GAP + SIDE :]
    for left in (0, *LEFT[1:]):
        assert (pixels[:, left - GAP + 2 if left else 0 : left - 2 if left else GAP - 2] == 255).all()
    assert (pixels[:, -GAP + 2 :] == 255).all()
    assert (pixels[-2:] == 255).all()
    assert (pixels != 255).any()


def test_wrong_is_shown_in_red(all_correct_run: Run) -> None:
    red = ImageColor.getrgb(sheet._WRONG)
    right = contact_sheet(all_correct_run.results[:1])
    wrong = contact_sheet([Result(all_correct_run.results[0].question, answered("Nothing."))])
    assert not (np.asarray(right)[GAP + SIDE :] == red).all(axis=2).any()
    assert (np.asarray(wrong)[GAP + SIDE :] == red).all(axis=2).any()


def test_without_a_chinese_font(all_correct_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No placeholder glyphs: boxes without labels, and a line that refers to the page."""
    monkeypatch.setattr(drawing, "_CJK_FONTS", ("no-such-font.ttf",))
    drawing._cjk_font.cache_clear()
    try:
        chinese = all_correct_run.results[-1]
        assert {box.ref for box in chinese.answer.boxes} != {None}
        assert {sheet._labelled(box).ref for box in chinese.answer.boxes} == {None}
        lines = [line for _, line in sheet._text(chinese)]
        assert lines[:-1] == 2 * sheet._wrapped(sheet._NO_FONT, SIDE)
        assert contact_sheet([chinese]).size[0] == GAP + 3 * STEP
    finally:
        drawing._cjk_font.cache_clear()
