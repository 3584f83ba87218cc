"""Lines in, commands and questions carried out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from paddlemix_qwenvl_plugin.chat_ui.files import Transcripts
from paddlemix_qwenvl_plugin.chat_ui.session import Session
from paddlemix_qwenvl_plugin.chat_ui.terminal import Terminal, interrupt, nothing, on_ctrl_c
from paddlemix_qwenvl_plugin.chat_ui.view import Plain
from paddlemix_qwenvl_plugin.util.debug import print_traceback_if_debugging
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of
from paddlemix_qwenvl_plugin.util.sources import is_address

HELP = """\
/image PATH   attach a picture to the next question (several: one line each);
              without PATH: drop those attached since the last question
/clear        forget the conversation
/save FILE    write the conversation to FILE, as Markdown (.md) or JSON (.json)
/help         this
/quit         leave; so does Ctrl-D
Any other line is a question, and one that begins with a space always is."""


def parse(line: str) -> tuple[str, str] | str:
    """Name and argument of a line `/name argument`; else the question, "" if there is none."""
    if not line.startswith("/"):
        return line.strip()
    name, argument, *_ = [*line[1:].strip().split(maxsplit=1), "", ""]
    return name, argument


def path_of(argument: str) -> str:
    """The path that was typed or dropped onto the terminal: `a b.png`, `"a b.png"`, `a\\ b.png` or `~/a.png`.

    A file is taken by the name as it stands if there is one.
    """
    if os.path.lexists(argument):
        return argument
    if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":
        argument = argument[1:-1]
    elif os.name != "nt" and not is_address(argument):  # a backslash is a separator there
        argument = re.sub(r"\\(.)", r"\1", argument)
    return os.path.expanduser(argument)  # noqa: PTH111 (a Path would fold the // of a URL)


class Conversation:
    """Carries out lines on a session, and shows what comes of them."""

    def __init__(self, session: Session, view: Plain) -> None:
        self._session = session
        self._view = view
        self._transcripts = Transcripts()

    def run(self, line: str) -> bool:
        """Carry out a line; False if it was /quit. Errors leave the conversation as it was."""
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
            raise UsageError(f"/{name}: takes nothing behind it")
        if name == "image":
            self._image(argument)
        elif name == "save":
            if not argument:
                raise UsageError("/save: name a file, .md or .json")
            target = Path(path_of(argument))
            self._transcripts.save(self._session, target)
            self._view.note(f"saved: {target}")
        elif name == "clear":
            self._session.clear()
            self._view.note("The conversation is forgotten.")
        elif name == "help":
            self._view.text(HELP)
        return name != "quit"

    def _image(self, argument: str) -> None:
        if argument:
            self._view.attached(self._session.attach(path_of(argument)))
        elif self._session.attached:
            self._session.attached = []
            self._view.note("The attached pictures are dropped.")
        else:
            raise UsageError("/image: name a picture")

    def _ask(self, question: str) -> None:
        stream = self._session.ask(question)
        with self._view.stopping(stream):
            segments = self._view.answer(stream)
            turn = self._session.record(question, stream, segments)
            if turn is None:
                self._view.note("(stopped before the answer; the question does not count)")
            else:
                self._view.answered(turn, self._session.picture)


def converse(conversation: Conversation, terminal: Terminal, read: Callable[[], str]) -> None:
    """A conversation with a person: an error is a line, and it goes on; Ctrl-D or /quit ends it.

    Between the lines Ctrl-C does nothing, so that one too many, after an answer say, does not end the program.
    """
    with on_ctrl_c(nothing):
        while True:
            try:
                line = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                terminal.note("(to leave: /quit or Ctrl-D)")
                continue
            try:
                with on_ctrl_c(interrupt):
                    going_on = conversation.run(line)
                if not going_on:
                    return
            except KeyboardInterrupt:
                terminal.note("(stopped)")
            except (QwenVLError, OSError, MemoryError) as error:
                print_traceback_if_debugging()
                terminal.error(line_of(error))


def follow(conversation: Conversation, lines: Iterable[str]) -> None:
    """A conversation with a program: the first error is raised."""
    for line in lines:
        if not conversation.run(line):
            return
