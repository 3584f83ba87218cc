"""Draw the pictures that `qwenvl demo` asks about, from the seeds in demo/questions.py.

python -m tools.draw_demo_images
"""

from __future__ import annotations

from pathlib import Path

from paddlemix_qwenvl_plugin.demo.questions import IMAGES, QUESTIONS
from paddlemix_qwenvl_plugin.demo.world.draw import draw


def main(folder: Path = IMAGES) -> None:
    folder.mkdir(exist_ok=True)
    for question in QUESTIONS:
        for scene, picture in zip(question.sample.scenes, question.images):
            draw(scene).save(folder / picture.name, optimize=True)


if __name__ == "__main__":
    main()
