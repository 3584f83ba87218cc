"""The errors a user meets. Each carries one clear line: what is wrong, with what, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 2000


class QwenVLError(Exception):
    """The request was understood and could not be carried out (exit code 1)."""

    exit_code = 1


class UsageError(QwenVLError):
    """The request itself is wrong: a flag, a value, a recipe key, a path that is not there (exit code 2)."""

    exit_code = 2


class RequestError(QwenVLError):
    """One of several requests failed; the others can go on."""


class TooLargeError(QwenVLError):
    """Something takes more bytes, pixels or memory than it may."""


def one_line(text: str) -> str:
    """`text` on one line that can be read, whatever a file in it is called or holds: nothing that a terminal obeys, and
    where it is very long its two ends.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"


def line_of(error: BaseException) -> str:
    """The line that tells a user of an error that is no defect of this package."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return one_line(f"{error.filename}: {reason}" if error.filename else reason)
    if isinstance(error, MemoryError):
        return one_line(f"out of memory ({error})" if str(error) else "out of memory")
    return one_line(str(error))


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, the name of its class if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError that names no file, as that of a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there; UsageError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot make this folder ({error.strerror})") from error
