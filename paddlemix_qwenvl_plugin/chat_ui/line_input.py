"""Line input on a terminal, with a persistent history.

It uses prompt_toolkit, not Python's readline: Windows has no readline, and on macOS readline is libedit, which has
another history format. prompt_toolkit also takes pasted text of several lines as one input, and handles wide
characters.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from paddlemix_qwenvl_plugin.util.errors import line_of


def line_reader(warn: Callable[[str], None]) -> Callable[[], str]:
    """Create a function that reads a line. It raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.

    Args:
        warn: called with a message if the history file cannot be created (the history is then kept in memory only), or
            if a line cannot be written to it.
    """
    session: PromptSession[str] = PromptSession(history=_history(warn), enable_suspend=True)
    return lambda: session.prompt("> ")


def _history(warn: Callable[[str], None]) -> History:
    try:
        file = user_state_path("qwenvl", appauthor=False) / "chat-history"
        file.parent.mkdir(parents=True, exist_ok=True)
        # Created here, so that only this user can read it.
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        warn(f"typed lines are not kept: {line_of(error)}")
        return InMemoryHistory()
    return _FileHistory(str(file), warn)


class _FileHistory(FileHistory):
    """History file whose write errors become warnings."""

    def __init__(self, filename: str, warn: Callable[[str], None]) -> None:
        super().__init__(filename)
        self._warn = warn

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:  # such as a full disk; the question is sent anyway
            self._warn(f"this line is not kept: {line_of(error)}")
