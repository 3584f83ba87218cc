"""Ask questions about two images in one prompt.

    python examples/compare_images.py
    python examples/compare_images.py --images before.png after.png --question "What differs?" \
        --model out/vision/vision out/text/qwen

The first command prints

    What is in Picture 1?                  A large brown triangle.
    What is in Picture 2?                  A large red star, a large red circle and the word "EGG".
    In which picture is a red circle?      Picture 2.
    Which picture has more shapes?         Picture 2.
    What colour is the star in Picture 2?  The star is red.
"""

from __future__ import annotations

from pathlib import Path

from demo_model import IMAGES, open_model, parser

QUESTIONS = [
    "What is in Picture 1?",
    "What is in Picture 2?",
    "In which picture is a red circle?",
    "Which picture has more shapes?",
    "What colour is the star in Picture 2?",
]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--images", type=Path, nargs="+", default=[IMAGES / "pair-1.png", IMAGES / "pair-2.png"]
    )
    flags.add_argument("--question", action="append", dest="questions")
    arguments = flags.parse_args()

    model = open_model(arguments)
    # The prompt announces each image by its number, "Picture 1:", which the questions refer to.
    images = [{"image": path.read_bytes()} for path in arguments.images]
    for question in arguments.questions or QUESTIONS:
        answer = model.generate([*images, {"text": question}], chat=True, max_new_tokens=128)
        print(f"{question:38} {answer.text.strip()}")


if __name__ == "__main__":
    main()
