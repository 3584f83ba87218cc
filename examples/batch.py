"""Answer a file of requests as one batch, and write the answers as JSON Lines.

    python examples/batch.py
    python examples/batch.py --requests requests.jsonl --model out/vision/vision out/text/qwen

A request is a line such as {"image": "street.png", "question": "Is there a dog?"}; relative paths of images start in
the folder of the file that --requests names, by default in that of the demo's images. The first command prints

    {"image": "pair-1.png", "question": "Describe the picture.", "answer": "A large brown triangle."}
    {"image": "caption.png", "question": "How many triangles are there?", "answer": "There are two triangles."}
    {"image": "count.png", "question": "How many purple shapes are there?", "answer": "There are two purple shapes."}
    {"image": "count.png", "question": "Where is the blue heart?", "answer": "The blue heart is at the top left."}
    {"image": "read.png", "question": "Read the text.", "answer": "It says HOUSE and OPEN."}
    {"image": "grounded.png", "question": "What does the text say?", "answer": "It says CLOCK."}
    {"image": "relation.png", "question": "What colour is the circle?", "answer": "The circle is brown."}
    {"image": "chinese.png", "question": "图中有几个心形？", "answer": "有四个心形。"}
    8 answers, 68 tokens

For jobs that must survive an interruption: `qwenvl batch` (docs/batch.md).
"""

from __future__ import annotations

import json
from pathlib import Path

from demo_model import IMAGES, open_model, parser

from paddlemix_qwenvl_plugin import GenerationOptions, Request

REQUESTS = Path(__file__).with_name("requests.jsonl")


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--requests", type=Path)
    arguments = flags.parse_args()
    rows = [json.loads(line) for line in (arguments.requests or REQUESTS).read_text("utf-8").splitlines()]
    folder = arguments.requests.parent if arguments.requests else IMAGES

    requests = []
    for row in rows:
        parts = [{"image": (folder / row["image"]).read_bytes()}, {"text": row["question"]}]
        # Each request has its own options, and gets the same tokens as alone.
        requests.append(Request(parts, GenerationOptions(max_new_tokens=128), chat=True))
    answers = open_model(arguments).generate_batch(requests)
    for row, answer in zip(rows, answers):
        print(json.dumps({**row, "answer": answer.text.strip()}, ensure_ascii=False))
    print(f"{len(answers)} answers, {sum(len(answer.token_ids) for answer in answers)} tokens")


if __name__ == "__main__":
    main()
