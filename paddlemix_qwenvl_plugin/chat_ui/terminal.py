"""A conversation on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from rich.console import Console

from paddlemix_qwenvl_plugin.chat_ui.ctrl_c import on_ctrl_c
from paddlemix_qwenvl_plugin.chat_ui.drawn import save_drawn
from paddlemix_qwenvl_plugin.chat_ui.preview import preview
from paddlemix_qwenvl_plugin.chat_ui.render import box_line, fragments
from paddlemix_qwenvl_plugin.chat_ui.session import Picture, Turn
from paddlemix_qwenvl_plugin.runtime.pieces import Piece
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream
from paddlemix_qwenvl_plugin.util.errors import one_line

_STYLES = {"text": None, "ref": "bold cyan", "box": "green"}


class Terminal:
    """See View."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for what the terminal's encoding lacks
        self._console = Console()

    def text(self, text: str) -> None:
        self._out(f"{text}\n")

    def note(self, text: str) -> None:
        self._out(f"{one_line(text)}\n", "dim")

    def error(self, line: str) -> None:
        self._out(f"{line}\n", "red")

    def waiting(self, text: str) -> contextlib.AbstractContextManager[object]:
        """Show that the program is at work."""
        return self._console.status(text)

    def attached(self, picture: Picture) -> None:
        width, height = picture.image.size
        self.note(f"Picture {picture.number}: {picture.name}, {width} x {height}")
        self._console.file.write(preview(picture.image, os.environ))
        self._console.file.flush()

    def stopping(self, stream: AnswerStream) -> contextlib.AbstractContextManager[None]:
        return on_ctrl_c(stream.stop)

    def answer(self, stream: AnswerStream) -> list[Piece]:
        pieces: list[Piece] = []

        def noted() -> Iterator[Piece]:
            for piece in stream:
                pieces.append(piece)
                yield piece

        waiting = self._console.status("Ctrl-C stops")
        try:
            waiting.start()
            for text, kind in fragments(noted()):
                waiting.stop()
                self._out(text, _STYLES[kind])
        finally:
            waiting.stop()
            self._out("\n" if pieces else "")
        return pieces

    def answered(self, turn: Turn, picture: Picture | None) -> None:
        answer = turn.answer
        if answer.finish_reason == "cancelled":
            self.note("(stopped)")
        elif answer.finish_reason == "length":
            self.note("(cut off at --max_new_tokens, or where the context is full)")
        for problem in answer.problems:
            self.note(problem)
        for number, box in enumerate(answer.boxes, start=1):
            self._out(f"{box_line(number, box, answer.image_size)}\n", "green")
        if answer.boxes and picture is not None:
            turn.drawn = save_drawn(picture, answer.boxes)
            self.note(f"boxes drawn: {turn.drawn}")

    def _out(self, text: str, style: str | None = None) -> None:
        self._console.out(text, end="", style=style, highlight=False)
