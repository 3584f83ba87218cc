"""A conversation through pipes: the answers and nothing else, for a program to read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from paddlemix_qwenvl_plugin.chat_ui.render import without_controls
from paddlemix_qwenvl_plugin.chat_ui.session import Picture, Turn
from paddlemix_qwenvl_plugin.runtime.pieces import Piece
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream
from paddlemix_qwenvl_plugin.util.errors import UsageError


class Plain:
    """See View. Answers are as `qwenvl predict` prints them, tags included, and as they come."""

    def text(self, text: str) -> None:
        print(text)

    def note(self, text: str) -> None:
        pass

    def attached(self, picture: Picture) -> None:
        pass

    def stopping(self, stream: AnswerStream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # Ctrl-C stops the program, as others in a script

    def answer(self, stream: AnswerStream) -> list[Piece]:
        pieces = []
        for piece in stream:
            pieces.append(piece)
            print(without_controls(piece.text), end="", flush=True)
        print(flush=True)
        return pieces

    def answered(self, turn: Turn, picture: Picture | None) -> None:
        for problem in turn.answer.problems:
            print(f"qwenvl: {problem}", file=sys.stderr)


def piped_lines() -> Iterator[str]:
    """The lines of standard input.

    Raises:
        UsageError: they are not text.
    """
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input: not {error.encoding} text") from error
