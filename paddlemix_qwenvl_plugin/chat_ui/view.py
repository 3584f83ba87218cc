"""How a conversation is shown: in a pipe, and what a terminal (terminal.py) does alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Optional

from paddlemix_qwenvl_plugin.chat_ui.session import Picture, Turn
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.runtime.model import Stream
from paddlemix_qwenvl_plugin.runtime.segments import Segment
from paddlemix_qwenvl_plugin.util.errors import one_line
from paddlemix_qwenvl_plugin.util.text import without_controls


class Fragment(NamedTuple):
    """A part of what is shown."""

    text: str
    kind: Literal["text", "ref", "box"]


def fragments(segments: Iterable[Segment]) -> Iterator[Fragment]:
    """Refs without their tags; boxes as [1], [2] … in their order; a malformed tag as the model said it."""
    n_boxes = 0
    last = ""
    for segment in segments:
        if segment.boxes:
            numbers = " ".join(f"[{n_boxes + i}]" for i in range(1, len(segment.boxes) + 1))
            n_boxes += len(segment.boxes)
            space = "" if not last or last.isspace() else " "
            fragment = Fragment(space + numbers, "box")
        elif segment.ref is not None:
            fragment = Fragment(without_controls(segment.ref), "ref")
        else:
            fragment = Fragment(without_controls(segment.text), "text")
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


class Plain:
    """A pipe that a program reads: answers as `qwenvl predict` prints them, tags included, and as they come."""

    def text(self, text: str) -> None:
        """Show what was asked for, as the help."""
        print(text)

    def note(self, text: str) -> None:
        """Say what happened, to a person."""

    def attached(self, picture: Picture) -> None:
        """Show a picture that was attached, to a person."""

    def stopping(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        """Let Ctrl-C stop this answer, and nothing else; here the program, as others in a script."""
        return contextlib.nullcontext()

    def answer(self, stream: Stream) -> list[Segment]:
        """Show an answer as it comes; its segments, also of one that was stopped."""
        segments = []
        for segment in stream:
            segments.append(segment)
            print(without_controls(segment.text), end="", flush=True)
        print(flush=True)
        return segments

    def answered(self, turn: Turn, picture: Picture | None) -> None:
        """Show what goes with a whole answer: its boxes in `picture`, and what was wrong with them."""
        for problem in turn.answer.problems:
            print(f"qwenvl: {one_line(problem)}", file=sys.stderr)
