"""The bundled questions and pictures are those of the seeds, and there is one of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from paddlemix_qwenvl_plugin.demo.questions import IMAGES, QUESTIONS
from tools.draw_demo_images import main as draw_pictures


def test_pictures_are_what_the_tool_draws(tmp_path: Path) -> None:
    draw_pictures(tmp_path)
    names = sorted(path.name for path in IMAGES.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for question in QUESTIONS for path in question.images)
    for name in names:
        with Image.open(IMAGES / name) as shipped, Image.open(tmp_path / name) as drawn:
            assert (shipped.mode, shipped.size) == ("RGB", (256, 256))
            difference = np.abs(np.asarray(shipped, np.int16) - np.asarray(drawn, np.int16)).max(axis=-1)
        # Letters differ with Pillow's version of the font code; shapes do not.
        assert (difference > 32).mean() < 0.01, name


def test_there_is_one_of_each_kind() -> None:
    kinds = {(question.turn.task, question.turn.language) for question in QUESTIONS}
    assert kinds == {
        ("caption", "en"),
        ("grounded caption", "en"),
        ("box", "en"),
        ("relation", "en"),
        ("count", "en"),
        ("reading", "en"),
        ("two pictures", "en"),
        ("grounded caption", "zh"),
    }
    assert {question.sample.form for question in QUESTIONS} == {"chat", "base"}
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_names_of_things_are_where_their_colour_is() -> None:
    """The scene description against the pixels: in the middle of each shape's box is its colour."""
    for question in QUESTIONS:
        for scene, path in zip(question.sample.scenes, question.images):
            with Image.open(path) as picture:
                pixels = np.asarray(picture, np.int16)
            for thing in scene.shapes:
                left, top, right, bottom = (value * 256 // 1000 for value in thing.box)
                colour = pixels[(top + bottom) // 2, (left + right) // 2]
                assert np.abs(colour - thing.rgb).max() <= scene.noise + 1, (path.name, thing)
