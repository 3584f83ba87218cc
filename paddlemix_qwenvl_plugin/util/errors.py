"""Errors for users. Each has a message of one line: the subject, what is wrong and, if not obvious, what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_MAX_LENGTH = 2000


class QwenVLError(Exception):
    """Base class of all expected errors: a valid request failed (exit code 1)."""

    exit_code = 1


class UsageError(QwenVLError):
    """An invalid request: a wrong flag, value or recipe key, or a path that does not exist (exit code 2)."""

    exit_code = 2


class RequestError(QwenVLError):
    """A failure of one of several requests, such as the rows of a batch job; the others are not affected."""


class TooLargeError(QwenVLError):
    """A limit on bytes, pixels, memory or time is exceeded."""


def one_line(text: str) -> str:
    """Format text as one printable line of at most about 2000 characters.

    Line breaks become spaces, unprintable characters (terminal controls included) `?`. The middle of a longer line is
    left out.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))
    return line if len(line) <= _MAX_LENGTH else f"{line[: _MAX_LENGTH // 2]} … {line[-_MAX_LENGTH // 2 :]}"


def line_of(error: BaseException) -> str:
    """Format an expected error as one line."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return one_line(f"{error.filename}: {reason}" if error.filename else reason)
    if isinstance(error, MemoryError):
        return one_line(f"out of memory ({error})" if str(error) else "out of memory")
    return one_line(str(error))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank; the name of its class if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError raised in the block if the error names no file, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they do not exist; raise UsageError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot make this folder ({error.strerror})") from error
