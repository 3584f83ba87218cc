"""Read the fields of a form into JSON, one question for each field.

    python examples/read_form.py
    python examples/read_form.py --image invoice.png --field total "What is the total?" \
        --field date "What is the date?" --model out/vision/vision out/text/qwen

The first command prints

    {
      "title": "It says MOUSE.",
      "colour of the title": "The text is green.",
      "shapes": "There are two shapes.",
      "colour of the star": "The star is purple.",
      "size of the circle": "The circle is small."
    }
"""

from __future__ import annotations

import json
from pathlib import Path

from demo_model import IMAGES, open_model, parser

from paddlemix_qwenvl_plugin import GenerationOptions, Request

FIELDS = [
    ("title", "Read the text."),
    ("colour of the title", "What colour is the text?"),
    ("shapes", "How many shapes are there?"),
    ("colour of the star", "What colour is the star?"),
    ("size of the circle", "Is the circle large or small?"),
]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--image", type=Path, default=IMAGES / "relation.png")
    flags.add_argument("--field", nargs=2, metavar=("NAME", "QUESTION"), action="append", dest="fields")
    arguments = flags.parse_args()
    fields = arguments.fields or FIELDS

    model = open_model(arguments)
    image = arguments.image.read_bytes()
    options = GenerationOptions(max_new_tokens=64)
    # The image is encoded once. On the engine, each decode step computes one token of every unfinished answer.
    answers = model.generate_batch(
        [Request([{"image": image}, {"text": question}], options, chat=True) for _, question in fields]
    )
    form = {name: answer.text.strip() for (name, _), answer in zip(fields, answers)}
    print(json.dumps(form, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
