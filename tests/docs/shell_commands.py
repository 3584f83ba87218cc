"""The simple commands of a shell example: words, without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

_HEREDOC = re.compile(r"<<'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^\$ (.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class Command(NamedTuple):
    """A program with its arguments, and the variables set before it."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def typed(session: str) -> str:
    """Lines of a console session that the user types, after the prompt `$ `."""
    return "\n".join(_PROMPT.findall(session))


def commands(script: str) -> Iterator[Command]:
    """The commands of a script of pipes, lists, redirections, here documents and assignments."""
    script = _HEREDOC.sub("", script).replace("\\\n", " ")
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not re.fullmatch(r"[|&;]+", word):
                words.append(word)
            elif words:
                yield _command(words)
                words = []


def _command(words: list[str]) -> Command:
    variables = {}
    while words and (match := _VARIABLE.fullmatch(words[0])):
        variables[match[1]] = match[2]
        words = words[1:]
    kept = [
        word
        for before, word in zip(["", *words], words)
        if not re.fullmatch("[<>]+", word) and not re.fullmatch("[<>]+", before)
    ]
    return Command(variables, kept[0] if kept else "", kept[1:])
