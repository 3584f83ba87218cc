"""The demo's synthetic images: a drawing shows its scene, and the answers to questions are true of the scene.

Expected answers to questions are computed from the scene here, not by the package's code for answers.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.demo.world import captions, pairs, questions
from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.names import COLOURS, SHAPES, SIZES
from paddlemix_qwenvl_plugin.demo.world.phrases import unique_names
from paddlemix_qwenvl_plugin.demo.world.scene import Scene, random_scene
from paddlemix_qwenvl_plugin.demo.world.tasks import held_out
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

SCENES = [random_scene(random.Random(f"test {i}")) for i in range(150)]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def test_samples_and_images_are_reproducible() -> None:
    assert [held_out(i) for i in range(20)] == [held_out(i) for i in range(20)]
    assert held_out(0) != held_out(1)
    for scene in SCENES[:5]:
        assert draw(scene).tobytes() == draw(scene).tobytes()


@pytest.mark.parametrize("side", [256, 640])
def test_boxes_surround_the_pixels(side: int) -> None:
    white = (255, 255, 255)
    for scene in SCENES[:60]:
        for thing in scene.things:
            alone = Scene((thing,), (white, white), noise=0, seed=0)
            changed = np.abs(np.asarray(draw(alone, side)).astype(int) - 255).max(axis=2) > 64
            ys, xs = np.nonzero(changed)
            drawn = [value * 1000 / side for value in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
            # Distances of the drawn pixels from the four sides of the bounds, positive towards the inside: at most two
            # pixels. Inside, 45 thousandths more for text: a digit 1 has space around it, and rotated letters do not
            # fill the corners.
            distances = np.subtract(drawn, thing.bounds) * [1, 1, -1, -1]
            assert distances.min() >= -2 * 1000 / side, thing
            assert distances.max() <= 2 * 1000 / side + (45 if thing.text else 0), thing
            # `box` is `bounds`, rounded to multiples of 10.
            assert np.abs(np.subtract(thing.box, thing.bounds)).max() <= 5


def test_things_do_not_overlap_and_are_in_reading_order() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.things) <= 4
        assert [thing.cell for thing in scene.things] == sorted({thing.cell for thing in scene.things})
        for i, a in enumerate(scene.things):
            column, row = a.cell % 3, a.cell // 3
            x, y = a.centre
            assert 1000 * row / 3 < y < 1000 * (row + 1) / 3
            # A text may be anywhere in its row.
            assert a.text or 1000 * column / 3 < x < 1000 * (column + 1) / 3
            for b in scene.things[:i]:
                a_left, a_top, a_right, a_bottom = a.bounds
                b_left, b_top, b_right, b_bottom = b.bounds
                assert a_left > b_right or b_left > a_right or a_top > b_bottom or b_top > a_bottom


@pytest.mark.parametrize("language", ["en", "zh"])
def test_unique_names_fit_one_shape_only(language: str) -> None:
    for scene in SCENES:
        for thing in scene.shapes:
            for name in unique_names(scene, thing, language):
                assert [shape for shape in scene.shapes if _fits(name, shape, language)] == [thing], name


def _fits(name: str, shape: Any, language: str) -> bool:
    """Whether no word in the name contradicts the shape's kind, colour, size and place."""
    for words, value in ((SHAPES, shape.kind), (COLOURS, shape.colour), (SIZES, shape.size)):
        if language == "zh":
            named_values = [key for key in words if words[key]["zh"] in name]
        else:
            named_values = [key for key in words if re.search(rf"\b{words[key][language]}\b", name)]
        if named_values and value not in named_values:
            return False
    cells = [cell for cell in range(9) if questions.PLACES[cell][language] in name]
    # "at the top" is part of "at the top left": use the longest match.
    longest = max(cells, key=lambda cell: len(questions.PLACES[cell][language]), default=None)
    return longest is None or longest == shape.cell


def test_counts() -> None:
    rng = random.Random(1)
    for scene in SCENES:
        turn = questions.count(rng, scene, "en")
        number, noun = re.fullmatch(r"There (?:is|are) (\w+) (.+)\.", turn.answer).groups()  # type: ignore[union-attr]
        # The singular, perhaps after a colour.
        if noun == "crosses":
            noun = "cross"
        elif noun != "cross":
            noun = noun.removesuffix("s")
        words = noun.split()
        counted = [
            shape
            for shape in scene.shapes
            if (words[-1] in ("shape", shape.kind)) and (len(words) == 1 or words[0] == shape.colour)
        ]
        assert number == NUMBERS[len(counted)], (turn, scene)


def test_existence() -> None:
    """The answers are true, and both yes and no occur."""
    rng = random.Random(2)
    answers = set()
    for scene in SCENES:
        turn = questions.exists(rng, scene, "en")
        words = turn.question.rstrip("?").split()  # … [colour] kind
        exists = any(
            shape.kind == words[-1] and (words[-2] not in COLOURS or shape.colour == words[-2])
            for shape in scene.shapes
        )
        assert turn.answer == ("Yes, there is." if exists else "No, there is not.")
        answers.add(exists)
    assert answers == {True, False}


def test_relations_follow_from_the_centres() -> None:
    rng = random.Random(3)
    n_compared = 0
    for scene in SCENES:
        turn = questions.side(rng, scene, "en")
        if turn is None:
            continue
        first, relation, second = re.fullmatch(
            r"Is (.+?) (to the left of|to the right of|above|below) (.+)\?", turn.question
        ).groups()  # type: ignore[union-attr]
        (a,), (b,) = (
            [shape for shape in scene.shapes if name in unique_names(scene, shape, "en")]
            for name in (first, second)
        )
        is_true = {
            "to the left of": a.centre[0] < b.centre[0],
            "to the right of": a.centre[0] > b.centre[0],
            "above": a.centre[1] < b.centre[1],
            "below": a.centre[1] > b.centre[1],
        }[relation]
        assert turn.answer.endswith(", so yes." if is_true else ", so no.")
        n_compared += 1
    assert n_compared > 30


def test_grounded_captions_parse_and_name_all_things() -> None:
    for scene in SCENES:
        for language in ("en", "zh"):
            parsed = parse_boxes(captions.caption_text(scene, language, boxes=True))
            assert not parsed.problems
            assert parsed.text == captions.caption_text(scene, language)
            boxes = [(*box.points[0], *box.points[1]) for box in parsed.boxes]
            assert boxes == [thing.box for thing in scene.things]
            assert all(thing.text in parsed.text for thing in scene.texts)


def test_which_of_two_images() -> None:
    """The shape that the question names is in one image only, the image of the answer."""
    rng = random.Random(4)
    n_checked = 0
    for first, second in zip(SCENES[::2], SCENES[1::2]):
        turn = pairs.which(rng, (first, second), "en")
        if turn is None or " text" in turn.question:
            continue
        words = re.search(r"an? ([a-z ]+)\?", turn.question).group(1).split()  # type: ignore[union-attr]
        has_shape = [
            any(
                shape.kind == words[-1] and (len(words) == 1 or shape.colour == words[0])
                for shape in scene.shapes
            )
            for scene in (first, second)
        ]
        assert has_shape == [turn.answer == "Picture 1.", turn.answer == "Picture 2."]
        n_checked += 1
    assert n_checked > 20


def test_noise_changes_the_image_slightly() -> None:
    scene = replace(SCENES[0], noise=8)
    noisy = np.asarray(draw(scene)).astype(int)
    clean = np.asarray(draw(replace(scene, noise=0))).astype(int)
    assert 0 < np.abs(noisy - clean).max() <= 8
