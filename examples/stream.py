"""Print an answer while it is generated, and each box as soon as it is complete.

    python examples/stream.py
    python examples/stream.py --image recipes/images/street.png --model out/vision/vision out/text/qwen

The first command prints

    A large red star [8, 20, 72, 84], a large red circle [92, 3, 166, 74] and the word "EGG" [51, 182, 174, 233].
    81 tokens, finish reason: stop
"""

from __future__ import annotations

from pathlib import Path

from demo_model import IMAGES, open_model, parser

from paddlemix_qwenvl_plugin import load_image


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--image", type=Path, default=IMAGES / "pair-2.png")
    flags.add_argument("--prompt", default="Generate the caption in English with grounding:")
    arguments = flags.parse_args()

    model = open_model(arguments)
    image = load_image(arguments.image)
    parts = [{"image": image}, {"text": arguments.prompt}]
    # Leaving the block early, as Ctrl-C does, cancels the request.
    with model.stream(parts, chat=False, max_new_tokens=256) as stream:
        for segment in stream:
            text = segment.ref or segment.text
            if segment.boxes:
                corners = [point for box in segment.boxes for point in box.to_pixels(*image.size)]
                text = f" {[round(value) for corner in corners for value in corner]}"
            print(text, end="", flush=True)
    print(f"\n{len(stream.answer.token_ids)} tokens, finish reason: {stream.answer.finish_reason}")


if __name__ == "__main__":
    main()
