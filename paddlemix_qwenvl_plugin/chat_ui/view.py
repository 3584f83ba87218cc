"""What a conversation is shown on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from paddlemix_qwenvl_plugin.chat_ui.session import Picture, Turn
from paddlemix_qwenvl_plugin.runtime.pieces import Piece
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream


class View(Protocol):
    """A terminal, or a pipe that a program reads."""

    def text(self, text: str) -> None:
        """Show what was asked for, as the help."""

    def note(self, text: str) -> None:
        """Say what happened."""

    def attached(self, picture: Picture) -> None:
        """Show a picture that was attached."""

    def stopping(self, stream: AnswerStream) -> AbstractContextManager[None]:
        """Let Ctrl-C stop this answer, and nothing else."""

    def answer(self, stream: AnswerStream) -> list[Piece]:
        """Show an answer as it comes; its pieces, also of one that was stopped."""

    def answered(self, turn: Turn, picture: Picture | None) -> None:
        """Show what goes with a whole answer: its boxes in `picture`, and what was wrong with them."""
