"""Find an object in an image, crop it, and draw its box.

    python examples/find_and_crop.py
    python examples/find_and_crop.py --image recipes/images/street.png --question "Give the box of the dog." \
        --model out/vision/vision out/text/qwen

The first command prints

    <ref>the blue heart in the centre</ref><box>(380,380),(540,530)</box>
    crop-1.png: the blue heart in the centre, 42 x 39 pixels of 256 x 256
"""

from __future__ import annotations

import math
from pathlib import Path

from demo_model import IMAGES, open_model, parser

from paddlemix_qwenvl_plugin import load_image
from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--image", type=Path, default=IMAGES / "locate.png")
    flags.add_argument("--question", default="Draw a box around the blue heart in the centre.")
    flags.add_argument("--out", type=Path, default=Path("out/find_and_crop"), help="folder for the results")
    arguments = flags.parse_args()

    model = open_model(arguments)
    image = load_image(arguments.image)
    answer = model.generate([{"image": image}, {"text": arguments.question}], chat=True, max_new_tokens=128)
    print(answer.text)

    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, box in enumerate(answer.boxes, start=1):
        xs, ys = zip(*box.to_pixels(*image.size))  # two corners of a box, or four of a quad
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
        crop = image.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        crop.save(arguments.out / f"crop-{number}.png")
        print(
            f"crop-{number}.png: {box.ref}, {crop.width} x {crop.height} pixels of {image.width} x {image.height}"
        )
    draw_boxes(image, answer.boxes).save(arguments.out / "boxes.png")


if __name__ == "__main__":
    main()
