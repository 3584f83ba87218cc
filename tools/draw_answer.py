"""Draw the README's picture: an answer in Qwen-VL's format on recipes/pictures/street.png.

No model said this: the answer is written by hand, with the places of the things that draw_street.py draws.

Run: python tools/draw_answer.py docs/pictures/drawn-answer.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes

PICTURE = Path(__file__).resolve().parents[1] / "recipes" / "pictures" / "street.png"

ANSWER = (
    "A street with <ref>a red house</ref><box>(73,172),(417,676)</box>, "
    "<ref>a tree</ref><box>(365,255),(614,683)</box>, "
    "<ref>a brown dog</ref><box>(285,669),(453,857)</box>, "
    "<ref>a blue car</ref><box>(583,656),(889,932)</box> and "
    "<ref>a stop sign</ref><box>(870,368),(982,688)</box>"
)


def main(target: Path) -> None:
    parsed = parse_boxes(ANSWER)
    if parsed.problems:
        raise ValueError(f"the answer is not well formed: {parsed.problems}")
    with Image.open(PICTURE) as picture:
        draw_boxes(picture, parsed.boxes).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
