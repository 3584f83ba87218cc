"""Plain view of a conversation for pipes, and formatting shared by the terminal view and saved transcripts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Optional

from paddlemix_qwenvl_plugin.chat_ui.session import AttachedImage, Turn
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.runtime.model import Stream
from paddlemix_qwenvl_plugin.runtime.segments import Segment
from paddlemix_qwenvl_plugin.util.errors import one_line
from paddlemix_qwenvl_plugin.util.text import without_controls


class Fragment(NamedTuple):
    """Displayed part of an answer."""

    text: str
    kind: Literal["text", "ref", "box"]


def fragments(segments: Iterable[Segment]) -> Iterator[Fragment]:
    """Convert segments for display: refs without tags, boxes as numbers [1], [2] …, malformed tags verbatim."""
    n_boxes = 0
    last_character = ""
    for segment in segments:
        if segment.boxes:
            numbers = " ".join(f"[{n_boxes + i}]" for i in range(1, len(segment.boxes) + 1))
            n_boxes += len(segment.boxes)
            separator = "" if not last_character or last_character.isspace() else " "
            fragment = Fragment(separator + numbers, "box")
        elif segment.ref is not None:
            fragment = Fragment(without_controls(segment.ref), "ref")
        else:
            fragment = Fragment(without_controls(segment.text), "text")
        last_character = fragment.text[-1:]
        yield fragment


def box_line(number: int, box: Box, image_size: Optional[tuple[int, int]]) -> str:
    """Format a box as `[1] a red house: (70, 110), (400, 433)`.

    Args:
        image_size: (width, height) in pixels; the points are then in pixels. None: the points are in thousandths.
    """
    points = box.to_pixels(*image_size) if image_size else box.points
    corners = ", ".join(f"({round(x)}, {round(y)})" for x, y in points)
    name = f" {' '.join(without_controls(box.ref).split())}" if box.ref else ""
    return f"[{number}]{name}: {corners}{'' if image_size else ' (thousandths)'}"


class PlainView:
    """View for a pipe: prints the text of answers, tags included, while it is generated."""

    def text(self, text: str) -> None:
        """Print the output of a command, such as the help."""
        print(text)

    def note(self, text: str) -> None:
        """Show a note; ignored in a pipe."""

    def attached(self, image: AttachedImage) -> None:
        """Show an attached image; ignored in a pipe."""

    def stop_on_ctrl_c(self, stream: Stream) -> contextlib.AbstractContextManager[None]:
        """Let Ctrl-C stop the answer within the block; in a pipe Ctrl-C ends the program."""
        return contextlib.nullcontext()

    def answer(self, stream: Stream) -> list[Segment]:
        """Print an answer as it is generated; return its segments, of a stopped answer those generated so far."""
        segments = []
        for segment in stream:
            segments.append(segment)
            print(without_controls(segment.text), end="", flush=True)
        print(flush=True)
        return segments

    def answered(self, turn: Turn, image: AttachedImage | None) -> None:
        """Show the problems of an ended answer's tags, here on stderr; TerminalView also draws its boxes on `image`."""
        for problem in turn.answer.problems:
            print(f"qwenvl: {one_line(problem)}", file=sys.stderr)
