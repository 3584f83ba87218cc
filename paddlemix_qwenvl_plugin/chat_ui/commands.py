"""What a typed line means."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from paddlemix_qwenvl_plugin.util.sources import is_address

HELP = """\
/image PATH   attach a picture to the next question (several: one line each);
              without PATH: drop those attached since the last question
/clear        forget the conversation
/save FILE    write the conversation to FILE, as Markdown (.md) or JSON (.json)
/help         this
/quit         leave; so does Ctrl-D
Any other line is a question, and one that begins with a space always is."""


@dataclass(frozen=True)
class Command:
    """A line `/name argument`."""

    name: str
    argument: str = ""


def parse(line: str) -> Command | str:
    """The command of a line that begins with a slash; else the question, "" if there is none."""
    if not line.startswith("/"):
        return line.strip()
    name, *rest = line[1:].strip().split(maxsplit=1) or [""]
    return Command(name, *rest)


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
