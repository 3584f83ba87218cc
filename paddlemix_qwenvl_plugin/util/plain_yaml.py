"""A restricted YAML reader for recipes and settings: plain data of limited size and depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from paddlemix_qwenvl_plugin.util.errors import UsageError

MAX_BYTES = 1 << 16
"""Maximum size of a file. Recipes and settings take a few kilobytes; some YAML constructs take long to parse."""

_MAX_DEPTH = 32
_INT_BITS = 63  # of a 64-bit integer, without the sign


def read_file(path: Path, what: str) -> Any:
    """Read a YAML file of at most MAX_BYTES.

    Args:
        what: kind of file for the error message, such as "a recipe".

    Raises:
        UsageError: the file cannot be read, is too long, or is not plain YAML; the message names the file and, if they
            are known, line and column.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: longer than {MAX_BYTES >> 10} KiB; is it {what}?")
    try:
        return read(text)
    except NotPlain as error:
        raise UsageError(f"{path}{error.where}: {error}") from error


class NotPlain(Exception):
    """Text that is not plain YAML; `where` is ":line:column", or empty if the position is unknown."""

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


def read(text: str) -> Any:
    """Parse YAML text into mappings, lists, strings, numbers, booleans and None.

    Raises:
        NotPlain: invalid YAML, a duplicate key, an alias, more than 32 levels of nesting, or a value that JSON or a
            command line cannot represent.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
        _check(data, "", 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise NotPlain(str(error.problem), f":{mark.line + 1}:{mark.column + 1}" if mark else "") from error
    except RecursionError as error:
        raise NotPlain(f"nested more than {_MAX_DEPTH} deep") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # A value that does not fit its tag, such as an invalid date, raises almost any exception.
        raise NotPlain(" ".join(str(error).split()) or type(error).__name__) from error
    return data


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also rejects duplicate keys (PyYAML silently keeps the last) and aliases.

    A few nested aliases expand to gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias; write its value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _check(value: Any, where: str, depth: int) -> None:
    """Raise ValueError, with the dotted key `where`, for a value that JSON or a command line cannot represent.

    Nesting deeper than _MAX_DEPTH raises RecursionError, as even deeper nesting does in the YAML parser.
    """
    if depth > _MAX_DEPTH:
        raise RecursionError
    problem = ""
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, where, depth + 1)
            _check(item, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, f"{where}.{i}" if where else str(i), depth + 1)
    elif isinstance(value, str):
        if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            problem = "text with a NUL or half a surrogate pair"
    elif isinstance(value, int):
        problem = "a number of more than 64 bits" if value.bit_length() > _INT_BITS else ""
    elif isinstance(value, float):
        problem = "" if math.isfinite(value) else "a number must be finite"
    elif value is not None:
        problem = f"a {type(value).__name__}, where text, a number, a list or a mapping is wanted; quote it"
    if problem:
        raise ValueError(f"{where}: {problem}" if where else problem)
