"""The picture of an answer's boxes, in a file of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from paddlemix_qwenvl_plugin.chat_ui.session import Picture
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.processing.drawing import draw_boxes
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.sources import is_address


def save_drawn(picture: Picture, boxes: Sequence[Box]) -> Path:
    """Draw `boxes`, numbered as in the answer, to a new PNG file in the working folder, named after the picture.

    Raises:
        OSError: it cannot be written.
    """
    numbered = [
        replace(box, ref=f"{number} {box.ref or ''}".strip()) for number, box in enumerate(boxes, start=1)
    ]
    drawn = draw_boxes(picture.image, numbered)
    for number in itertools.count(1):
        target = Path(f"{_stem(picture)}-boxes-{number}.png")
        try:
            target.touch(exist_ok=False)  # takes the name: two chats in a folder do not write the same file
        except FileExistsError:
            continue
        try:
            write_beside(target, drawn.save)
        except BaseException:
            target.unlink()
            raise
        return target
    raise AssertionError("unreachable")


def _stem(picture: Picture) -> str:
    name = urlsplit(picture.name).path if is_address(picture.name) else picture.name
    return re.sub(r"[^\w.-]+", "_", Path(name).stem)[:60] or "picture"
