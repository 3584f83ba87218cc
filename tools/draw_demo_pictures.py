"""Draw the pictures that `qwenvl demo` asks about, from the seeds in demo/questions.py.

python -m tools.draw_demo_pictures
"""

from __future__ import annotations

from pathlib import Path

from paddlemix_qwenvl_plugin.demo.questions import PICTURES, QUESTIONS
from paddlemix_qwenvl_plugin.demo.world.draw import draw


def main(folder: Path = PICTURES) -> None:
    folder.mkdir(exist_ok=True)
    for question in QUESTIONS:
        for scene, picture in zip(question.sample.scenes, question.pictures):
            draw(scene).save(folder / picture.name, optimize=True)


if __name__ == "__main__":
    main()
