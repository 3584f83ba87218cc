"""Draw the images of `qwenvl demo` from the seeds in demo/questions.py.

python -m tools.draw_demo_images
"""

from __future__ import annotations

from pathlib import Path

from paddlemix_qwenvl_plugin.demo.questions import IMAGES, QUESTIONS
from paddlemix_qwenvl_plugin.demo.world.draw import draw


def main(folder: Path = IMAGES) -> None:
    """Draw the images into `folder`; a test compares them with those in IMAGES."""
    folder.mkdir(exist_ok=True)
    for question in QUESTIONS:
        for scene, image in zip(question.sample.scenes, question.images):
            draw(scene).save(folder / image.name, optimize=True)


if __name__ == "__main__":
    main()
