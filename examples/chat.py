"""Hold a conversation about an image.

    python examples/chat.py
    python examples/chat.py --image recipes/images/street.png "Is there a dog?" "Where is it?" \
        --model out/vision/vision out/text/qwen

The first command, with the demo model, prints

    > How many hearts are there?
    There are four hearts.
    > What colour is the heart at the bottom right?
    The heart at the bottom right is yellow.
    > Locate the yellow heart.
    <ref>the yellow heart</ref><box>(650,740),(910,970)</box>
    > Is there a star?
    No, there is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo_model import IMAGES, open_model, parser

QUESTIONS = [
    "How many hearts are there?",
    "What colour is the heart at the bottom right?",
    "Locate the yellow heart.",
    "Is there a star?",
]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--image", type=Path, default=IMAGES / "locate.png")
    flags.add_argument("questions", nargs="*", default=QUESTIONS)
    arguments = flags.parse_args()

    chat = open_model(arguments).chat()
    attached: list[dict[str, Any]] = [{"image": arguments.image.read_bytes()}]
    for question in arguments.questions:
        # The image belongs to the first turn. On the engine, later turns take the full blocks (32 tokens) of the
        # conversation so far, image included, from the prefix cache.
        answer = chat.ask([*attached, {"text": question}], max_new_tokens=128).finish()
        attached = []
        print(f"> {question}\n{answer.text.strip()}")


if __name__ == "__main__":
    main()
