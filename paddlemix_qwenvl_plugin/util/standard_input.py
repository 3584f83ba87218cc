"""Standard input as bytes, text or lines of bounded length, or as a temporary file of any length."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from paddlemix_qwenvl_plugin.util.errors import UsageError

NAME = "standard input"
"""Name of standard input in messages."""

_MAX_TEXT = 1 << 20  # maximum bytes of the input of read_text, and of a line of `lines`, line ends included
_MAX_BYTES = 50 << 20  # default limit of read_bytes


def read_bytes(limit: int = _MAX_BYTES) -> bytes:
    """Read all of standard input.

    Raises:
        UsageError: standard input is closed, or has more than `limit` bytes.
    """
    return _bounded(_buffer().read(limit + 1), limit)


def copied() -> BinaryIO:
    """Copy all of standard input, of any length, to a temporary file. Raises UsageError if standard input is closed."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(_buffer(), file)
    file.seek(0)
    return file


def read_text() -> str:
    """Read all of standard input as text, without trailing line ends; at most 1 MiB.

    Raises:
        UsageError: standard input is closed, too long, or not text in its encoding.
    """
    return _decoded(read_bytes(_MAX_TEXT)).rstrip("\r\n")


def lines() -> Iterator[str]:
    """Yield the lines of standard input, with their line ends, as they arrive.

    Raises:
        UsageError: standard input is closed, or a line is longer than 1 MiB or not text in its encoding.
    """
    while line := _buffer().readline(_MAX_TEXT + 1):
        yield _decoded(_bounded(line, _MAX_TEXT))


def check() -> None:
    """Raise UsageError if standard input is closed; for use before a long computation."""
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
    except UnicodeDecodeError as error:  # sys.stdin itself may have a lenient error handler
        raise UsageError(f"{NAME}: not {encoding} text") from error
