"""Interpreter of the input lines of `qwenvl chat`: commands and questions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from paddlemix_qwenvl_plugin.chat_ui.files import Transcripts
from paddlemix_qwenvl_plugin.chat_ui.session import Session
from paddlemix_qwenvl_plugin.chat_ui.terminal import (
    TerminalView,
    do_nothing,
    on_ctrl_c,
    raise_keyboard_interrupt,
)
from paddlemix_qwenvl_plugin.chat_ui.view import PlainView
from paddlemix_qwenvl_plugin.util.debug import print_traceback_if_debugging
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of
from paddlemix_qwenvl_plugin.util.sources import is_address

HELP = """\
/image PATH   attach an image to the next question (one line for each image);
              without PATH: remove the images attached since the last question
/clear        clear the conversation
/save FILE    write the conversation to FILE, as Markdown (.md) or JSON (.json)
/help         show this help
/quit         leave; also Ctrl-D
A line that does not begin with / is a question. If a question begins with /,
type a space before it."""


def parse(line: str) -> tuple[str, str] | str:
    """Parse a line into the name and argument of a command, or into a question ("" for a blank line)."""
    if not line.startswith("/"):
        return line.strip()
    words = line[1:].strip().split(maxsplit=1)
    name = words[0] if words else ""
    argument = words[1] if len(words) > 1 else ""
    return name, argument


def path_of(argument: str) -> str:
    r"""Decode a path typed or dropped onto the terminal: `a b.png`, `"a b.png"`, `a\ b.png` or `~/a.png`.

    An address keeps its backslashes. If a file has `argument` as its literal name, `argument` is returned unchanged.
    """
    if os.path.lexists(argument):
        return argument
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    elif os.name != "nt" and not is_address(argument):  # on Windows a backslash is a separator
        argument = re.sub(r"\\(.)", r"\1", argument)  # remove the backslash of each escaped character
    return os.path.expanduser(argument)  # noqa: PTH111 (a Path would fold the // of a URL)


class Conversation:
    """Interpreter of questions and commands: applies them to a session and shows the results in a view."""

    def __init__(self, session: Session, view: PlainView) -> None:
        self._session = session
        self._view = view
        self._transcripts = Transcripts()

    def run(self, line: str) -> bool:
        """Execute a line; return False for /quit.

        After an error the conversation is unchanged, except that an answer whose boxes cannot be drawn is kept.
        """
        parsed = parse(line)
        if not isinstance(parsed, str):
            return self._command(*parsed)
        if parsed:
            self._ask(parsed)
        return True

    def _command(self, name: str, argument: str) -> bool:
        if name not in ("image", "save", "clear", "help", "quit"):
            raise UsageError(f"/{name}: no such command; see /help")
        if argument and name not in ("image", "save"):
            raise UsageError(f"/{name}: takes no argument")
        if name == "image":
            self._change_images(argument)
        elif name == "save":
            if not argument:
                raise UsageError("/save: name a file, .md or .json")
            target = Path(path_of(argument))
            self._transcripts.save(self._session, target)
            self._view.note(f"saved: {target}")
        elif name == "clear":
            self._session.clear()
            self._view.note("The conversation is cleared.")
        elif name == "help":
            self._view.text(HELP)
        return name != "quit"

    def _change_images(self, argument: str) -> None:
        """Execute /image: attach an image, or without an argument remove the attached ones."""
        if argument:
            self._view.attached(self._session.attach(path_of(argument)))
        elif self._session.attached:
            self._session.attached = []
            self._view.note("The attached images are removed.")
        else:
            raise UsageError("/image: name an image")

    def _ask(self, question: str) -> None:
        stream = self._session.ask(question)
        with self._view.stop_on_ctrl_c(stream):
            segments = self._view.answer(stream)
            turn = self._session.record(question, stream, segments)
            if turn is None:
                self._view.note("(stopped before the answer; the question is discarded)")
            else:
                self._view.answered(turn, self._session.image)


def converse(conversation: Conversation, terminal: TerminalView, read: Callable[[], str]) -> None:
    """Run an interactive conversation until Ctrl-D or /quit; an error is shown and the conversation continues.

    Ctrl-C between the end of a line's execution and the next prompt has no effect: a user who wants to stop an answer
    may press it just after the answer's end, which must not end the program.

    Args:
        read: reads a line; raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.
    """
    with on_ctrl_c(do_nothing):
        while True:
            try:
                line = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                terminal.note("(to leave: /quit or Ctrl-D)")
                continue
            try:
                with on_ctrl_c(raise_keyboard_interrupt):
                    quits = not conversation.run(line)
                if quits:
                    return
            except KeyboardInterrupt:
                terminal.note("(stopped)")
            except (QwenVLError, OSError, MemoryError) as error:
                print_traceback_if_debugging()
                terminal.error(line_of(error))


def run_lines(conversation: Conversation, lines: Iterable[str]) -> None:
    """Execute lines, such as those of a pipe, until /quit; the first error is raised."""
    for line in lines:
        if not conversation.run(line):
            return
