"""Atomic writes of files and folders, and checks of source and target paths before a long computation."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.util.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.util.scratch import scratch_folder


def write_beside(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically: `write` creates a temporary file next to `target`, which is then renamed to `target`.

    The temporary file has the suffix of `target`.

    Raises:
        OSError: the file cannot be written; the error names a file.
    """
    # A unique name: another process may be writing the same file.
    partial = target.with_name(f".partial-{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        with naming(target):
            write(partial)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises as `write_beside`."""
    write_beside(target, lambda partial: partial.write_text(text, "utf-8"))


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Create a folder atomically: yield a temporary folder to fill, then rename it to `target`.

    Raises:
        UsageError: `target` exists, or its parent cannot be created.
        OSError: the folder cannot be written; the error names a file.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name a new folder")
    make_folder(target.parent)
    with naming(target), scratch_folder(target, "partial") as scratch:
        partial = scratch / "new"  # not the scratch folder itself, which has a lock file
        partial.mkdir()
        yield partial
        if target.exists():  # another process created it meanwhile
            raise UsageError(f"{target}: exists already; name a new folder")
        partial.replace(target)


def check_target(target: Path, may_replace: Callable[[Path], bool] = lambda target: True) -> None:
    """Check that a file can be written to `target`, before a long computation.

    Args:
        may_replace: whether an existing file that is not empty may be replaced, because an earlier run of the command
            wrote it.

    Raises:
        UsageError: the folder of `target` does not exist, or `target` is a folder or a device, or may not be replaced.
    """
    if target.exists() and not target.is_file():
        raise UsageError(f"{target}: is a folder or a device; name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder")
    if target.exists() and target.stat().st_size and not may_replace(target):
        raise UsageError(f"{target}: exists, and this command did not write it; name another file")


def check_source(source: Path) -> None:
    """Check that `source` is a regular file.

    Raises:
        UsageError: the path does not exist, or is not a regular file.
    """
    if not source.is_file():
        raise UsageError(f"{source}: {'not a file' if source.exists() else 'no such file'}")
