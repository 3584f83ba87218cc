"""Pieces of an answer as a person reads them: refs as words, boxes as numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Optional

from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.runtime.pieces import Piece

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Fragment(NamedTuple):
    """A part of what is shown."""

    text: str
    kind: Literal["text", "ref", "box"]


def without_controls(text: str) -> str:
    """`text` with nothing in it that a terminal obeys but new lines and tabs."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def fragments(pieces: Iterable[Piece]) -> Iterator[Fragment]:
    """Refs without their tags; boxes as [1], [2] … in their order; a malformed tag as the model said it."""
    n_boxes = 0
    last = ""
    for piece in pieces:
        if piece.boxes:
            numbers = " ".join(f"[{n_boxes + i}]" for i in range(1, len(piece.boxes) + 1))
            n_boxes += len(piece.boxes)
            space = "" if not last or last.isspace() else " "
            fragment = Fragment(space + numbers, "box")
        elif piece.ref is not None:
            fragment = Fragment(without_controls(piece.ref), "ref")
        else:
            fragment = Fragment(without_controls(piece.text), "text")
        last = fragment.text[-1:]
        yield fragment


def box_line(number: int, box: Box, image_size: Optional[tuple[int, int]]) -> str:
    """`[1] a red house: (70, 110), (400, 433)`, in pixels of a picture of (width, height).

    Without a picture the points are in thousandths.
    """
    points = box.to_pixels(*image_size) if image_size else box.points
    corners = ", ".join(f"({round(x)}, {round(y)})" for x, y in points)
    name = f" {' '.join(without_controls(box.ref).split())}" if box.ref else ""
    return f"[{number}]{name}: {corners}{'' if image_size else ' (thousandths)'}"
