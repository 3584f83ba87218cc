"""Lines from a terminal, with a history that outlives the program.

prompt_toolkit rather than Python's readline: Windows has no readline, and macOS a stand-in with a history file of its
own form. It also takes a paste of several lines as one, and knows how wide a Chinese character is.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from paddlemix_qwenvl_plugin.util.errors import line_of


def line_reader(warn: Callable[[str], None]) -> Callable[[], str]:
    """A function that reads a line; it raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.

    What is wrong with the history's file is told to `warn`, and the history then ends with the program.
    """
    session: PromptSession[str] = PromptSession(history=_history(warn), enable_suspend=True)
    return lambda: session.prompt("> ")


def _history(warn: Callable[[str], None]) -> History:
    try:
        file = user_state_path("qwenvl", appauthor=False) / "chat-history"
        file.parent.mkdir(parents=True, exist_ok=True)
        # What one asks is nobody else's business.
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warn(f"typed lines are not kept: {line_of(error)}")
        return InMemoryHistory()
    return _FileHistory(str(file), warn)


class _FileHistory(FileHistory):
    def __init__(self, filename: str, warn: Callable[[str], None]) -> None:
        super().__init__(filename)
        self._warn = warn

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:  # as on a full disk; the question is asked all the same
            self._warn(f"this line is not kept: {line_of(error)}")
