"""The demo's bundled images: drawn by tools/draw_demo_images.py, and true to their scenes; a question of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from paddlemix_qwenvl_plugin.demo.questions import IMAGES, QUESTIONS
from tools.draw_demo_images import main as draw_images


def test_images_equal_those_drawn_by_the_tool(tmp_path: Path) -> None:
    draw_images(tmp_path)
    names = sorted(path.name for path in IMAGES.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for question in QUESTIONS for path in question.images)
    for name in names:
        with Image.open(IMAGES / name) as bundled, Image.open(tmp_path / name) as drawn:
            assert (bundled.mode, bundled.size) == ("RGB", (256, 256))
            difference = np.abs(np.asarray(bundled, np.int16) - np.asarray(drawn, np.int16)).max(axis=-1)
        # Letters depend on Pillow's FreeType version, shapes do not.
        assert (difference > 32).mean() < 0.01, name


def test_one_question_of_each_kind() -> None:
    kinds = {(question.turn.task, question.turn.language) for question in QUESTIONS}
    assert kinds == {
        ("caption", "en"),
        ("grounded caption", "en"),
        ("box", "en"),
        ("relation", "en"),
        ("count", "en"),
        ("reading", "en"),
        ("two images", "en"),
        ("grounded caption", "zh"),
    }
    assert {question.sample.form for question in QUESTIONS} == {"chat", "base"}
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)


def test_shapes_of_the_scenes_are_in_the_images() -> None:
    """The pixel at the centre of a shape's box has the shape's colour."""
    for question in QUESTIONS:
        for scene, path in zip(question.sample.scenes, question.images):
            with Image.open(path) as image:
                pixels = np.asarray(image, np.int16)
            for shape in scene.shapes:
                left, top, right, bottom = (value * 256 // 1000 for value in shape.box)
                colour = pixels[(top + bottom) // 2, (left + right) // 2]
                assert np.abs(colour - shape.rgb).max() <= scene.noise + 1, (path.name, shape)
