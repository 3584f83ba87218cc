"""Standard input: of bounded length, and text where text is wanted."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from paddlemix_qwenvl_plugin.util.errors import UsageError

NAME = "standard input"
"""What messages call it."""

_MAX_TEXT = 1 << 20
_MAX_BYTES = 50 << 20


def read_bytes(limit: int = _MAX_BYTES) -> bytes:
    """All of it.

    Raises:
        UsageError: there is none, or more than `limit` bytes.
    """
    return _bounded(_buffer().read(limit + 1), limit)


def copied() -> BinaryIO:
    """All of it, whatever its length, in a file that goes when it is closed. Raises UsageError if there is none."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (who asked for it closes it)
    shutil.copyfileobj(_buffer(), file)
    file.seek(0)
    return file


def read_text() -> str:
    """All of it, without the line end at its end. Raises UsageError as `read_bytes`, and for what is not text."""
    return _decoded(read_bytes(_MAX_TEXT)).rstrip("\r\n")


def lines() -> Iterator[str]:
    """Each line when it is there. Raises UsageError for a line too long, and for one that is not text."""
    while line := _buffer().readline(_MAX_TEXT + 1):
        yield _decoded(_bounded(line, _MAX_TEXT))


def check() -> None:
    """Find out before long work whether there is one. Raises UsageError if it is closed."""
    if sys.stdin is None:
        raise UsageError(f"{NAME}: is closed; give it a file or a pipe")


def _buffer() -> Any:
    check()
    return sys.stdin.buffer


def _bounded(content: bytes, limit: int) -> bytes:
    if len(content) > limit:
        raise UsageError(f"{NAME}: more than {limit >> 20} MiB")
    return content


def _decoded(content: bytes) -> str:
    encoding = sys.stdin.encoding
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:  # as sys.stdin would be, were it not for its error handler
        raise UsageError(f"{NAME}: not {encoding} text") from error
