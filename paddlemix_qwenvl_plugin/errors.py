"""The errors a user meets. Each carries one clear line: what is wrong, with what, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


class QwenVLError(Exception):
    """The request was understood and could not be carried out (exit code 1)."""

    exit_code = 1


class UsageError(QwenVLError):
    """The request itself is wrong: a flag, a value, a recipe key, a path that is not there (exit code 2)."""

    exit_code = 2


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
