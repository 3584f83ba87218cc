"""Parser of shell examples: splits a script into its commands, without running them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

_HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^\$ (.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Command(NamedTuple):
    """A program, its arguments, and the variables that are assigned before it, as in `A=1 program`."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def typed_lines(session: str) -> str:
    """The lines of a console session that the user types, after the prompt `$ `."""
    return "\n".join(_PROMPT.findall(session))


def commands(script: str) -> Iterator[Command]:
    """Yield the commands of a script.

    The script may have pipes, lists (`a && b; c`), redirections, here documents and assignments, but no control flow.
    An assignment without a program is a command with an empty program.
    """
    script = _HEREDOC.sub("", script).replace("\\\n", " ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;]+", word):  # not a separator
                words.append(word)
            elif words:
                yield _command(words)
                words = []


def _command(words: list[str]) -> Command:
    variables = {}
    while words and (match := _VARIABLE.fullmatch(words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    # Leave out redirections: an operator and the word after it.
    program_and_arguments = [
        word
        for previous, word in zip(["", *words], words)
        if not re.fullmatch("[<>]+", word) and not re.fullmatch("[<>]+", previous)
    ]
    program, *arguments = program_and_arguments or [""]
    return Command(variables, program, arguments)
