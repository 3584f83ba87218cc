"""The demo world: drawings match the scene, and answers follow from it."""

from __future__ import annotations

import random
import re
from dataclasses import replace

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


def test_a_number_gives_the_same_sample_and_the_same_image() -> None:
    assert [held_out(i) for i in range(20)] == [held_out(i) for i in range(20)]
    assert held_out(0) != held_out(1)
    for scene in SCENES[:5]:
        assert draw(scene).tobytes() == draw(scene).tobytes()


@pytest.mark.parametrize("side", [256, 640])
def test_boxes_surround_the_pixels(side: int) -> None:
    white = (255, 255, 255)
    for scene in SCENES[:60]:
        for thing in scene.things:
            alone = Scene((thing,), (white, white), 0, 0)
            changed = np.abs(np.asarray(draw(alone, side)).astype(int) - 255).max(axis=2) > 64
            ys, xs = np.nonzero(changed)
            drawn = [value * 1000 / side for value in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
            # Less at the inside: a digit 1 has space around it, and rotated letters do not fill the corners.
            inwards = np.subtract(drawn, thing.bounds) * [1, 1, -1, -1]
            assert inwards.min() >= -2 * 1000 / side, thing
            assert inwards.max() <= 2 * 1000 / side + (45 if thing.text else 0), thing
            assert np.abs(np.subtract(thing.box, thing.bounds)).max() <= 5


def test_things_are_apart_and_in_reading_order() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.things) <= 4
        assert [thing.cell for thing in scene.things] == sorted({thing.cell for thing in scene.things})
        for i, a in enumerate(scene.things):
            column, row = a.cell % 3, a.cell // 3
            x, y = a.centre
            assert 1000 * row / 3 < y < 1000 * (row + 1) / 3
            assert a.text or 1000 * column / 3 < x < 1000 * (column + 1) / 3
            for b in scene.things[:i]:
                aside = a.bounds[0] > b.bounds[2] or b.bounds[0] > a.bounds[2]
                assert aside or a.bounds[1] > b.bounds[3] or b.bounds[1] > a.bounds[3]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_unique_names_fit_one_shape_only(language: str) -> None:
    """Independent check: find the words of the name in each shape's full description."""
    for scene in SCENES:
        for thing in scene.shapes:
            for name in unique_names(scene, thing, language):
                assert [shape for shape in scene.shapes if _fits(name, shape, language)] == [thing], name


def _fits(name: str, shape: object, language: str) -> bool:
    for table, value in ((SHAPES, shape.kind), (COLOURS, shape.colour), (SIZES, shape.size)):  # type: ignore[attr-defined]
        named = [key for key in table if re.search(rf"\b{table[key][language]}\b", name)]
        if language == "zh":
            named = [key for key in table if table[key]["zh"] in name]
        if named and value not in named:
            return False
    places = [cell for cell in range(9) if questions.PLACES[cell][language] in name]
    # "at the top" is part of "at the top left": use the longest match.
    longest = max(places, key=lambda cell: len(questions.PLACES[cell][language]), default=None)
    return longest is None or longest == shape.cell  # type: ignore[attr-defined]


def test_counts_are_those_of_the_scene() -> None:
    rng = random.Random(1)
    for scene in SCENES:
        turn = questions.count(rng, scene, "en")
        number, noun = re.fullmatch(r"There (?:is|are) (\w+) (.+)\.", turn.answer).groups()  # type: ignore[union-attr]
        noun = (
            noun.removesuffix("es")
            if noun == "crosses"
            else noun.removesuffix("s")
            if noun != "cross"
            else noun
        )
        words = noun.split()
        counted = [
            shape
            for shape in scene.shapes
            if (words[-1] in ("shape", shape.kind)) and (len(words) == 1 or words[0] == shape.colour)
        ]
        assert number == NUMBERS[len(counted)], (turn, scene)


def test_yes_and_no_and_both_occur() -> None:
    rng = random.Random(2)
    seen = set()
    for scene in SCENES:
        turn = questions.exists(rng, scene, "en")
        words = turn.question.rstrip("?").split()
        there = any(
            shape.kind == words[-1] and (words[-2] not in COLOURS or shape.colour == words[-2])
            for shape in scene.shapes
        )
        assert turn.answer == ("Yes, there is." if there else "No, there is not.")
        seen.add(there)
    assert seen == {True, False}


def test_relations_follow_from_the_centres() -> None:
    rng = random.Random(3)
    compared = 0
    for scene in SCENES:
        turn = questions.side(rng, scene, "en")
        if turn is None:
            continue
        first, word, second = re.fullmatch(
            r"Is (.+?) (to the left of|to the right of|above|below) (.+)\?", turn.question
        ).groups()  # type: ignore[union-attr]
        (a,), (b,) = (
            [shape for shape in scene.shapes if name in unique_names(scene, shape, "en")]
            for name in (first, second)
        )
        so = {
            "to the left of": a.centre[0] < b.centre[0],
            "to the right of": a.centre[0] > b.centre[0],
            "above": a.centre[1] < b.centre[1],
            "below": a.centre[1] > b.centre[1],
        }[word]
        assert turn.answer.endswith(", so yes." if so else ", so no.")
        compared += 1
    assert compared > 30


def test_grounded_captions_parse_and_name_all_things() -> None:
    for scene in SCENES:
        for language in ("en", "zh"):
            parsed = parse_boxes(captions.caption_text(scene, language, boxes=True))
            assert not parsed.problems
            assert parsed.text == captions.caption_text(scene, language)
            assert [(*box.points[0], *box.points[1]) for box in parsed.boxes] == [t.box for t in scene.things]
            assert all(thing.text in parsed.text for thing in scene.texts)


def test_which_image_is_never_both() -> None:
    rng = random.Random(4)
    asked = 0
    for here, other in zip(SCENES[::2], SCENES[1::2]):
        turn = pairs.which(rng, (here, other), "en")
        if turn is None or " text?" in turn.question or " text" in turn.question:
            continue
        words = re.search(r"an? ([a-z ]+)\?", turn.question).group(1).split()  # type: ignore[union-attr]
        has = [
            any(
                shape.kind == words[-1] and (len(words) == 1 or shape.colour == words[0])
                for shape in scene.shapes
            )
            for scene in (here, other)
        ]
        assert has == [turn.answer == "Picture 1.", turn.answer == "Picture 2."]
        asked += 1
    assert asked > 20


def test_noise_changes_the_image_slightly() -> None:
    scene = replace(SCENES[0], noise=8)
    noisy, clean = (np.asarray(draw(s)).astype(int) for s in (scene, replace(scene, noise=0)))
    assert 0 < np.abs(noisy - clean).max() <= 8
