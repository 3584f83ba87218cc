"""Caption every image of a folder.

    python examples/caption_folder.py
    python examples/caption_folder.py FOLDER --model out/vision/vision out/text/qwen

The first command prints

    caption.png   A large blue heart, a small green triangle, a large blue star and a small blue triangle.
    chinese.png   A small orange heart, a small green heart, a small purple heart and a large red heart.
    count.png     A small blue heart, a small purple star and a small purple cross.
    grounded.png  The word "CLOCK", a large black cross and a large purple cross.
    locate.png    A large red heart, a small blue heart, a large red heart and a large yellow heart.
    pair-1.png    A large brown triangle.
    pair-2.png    A large red star, a large red circle and the word "EGG".
    read.png      The word "HOUSE" and the word "OPEN".
    relation.png  The word "MOUSE", a large purple star and a small brown circle.
"""

from __future__ import annotations

from pathlib import Path

from demo_model import IMAGES, open_model, parser

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("folder", nargs="?", type=Path, default=IMAGES)
    flags.add_argument("--prompt", default="Generate the caption in English:")
    arguments = flags.parse_args()

    model = open_model(arguments)
    for path in sorted(arguments.folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            # chat=False: the base form, in which the prompt is used without ChatML. The image is passed as bytes,
            # because a path would become part of the prompt, which has room for a path of at most 256 bytes.
            parts = [{"image": path.read_bytes()}, {"text": arguments.prompt}]
            answer = model.generate(parts, chat=False, max_new_tokens=128)
            print(f"{path.name:13} {answer.text.strip()}")


if __name__ == "__main__":
    main()
