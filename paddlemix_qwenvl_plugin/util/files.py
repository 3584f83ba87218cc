"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.util.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.util.scratch import scratch_folder


def write_beside(target: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file beside `target`, of the same suffix, and rename it to `target` when it is whole.

    Raises:
        OSError: it cannot be written; the error names a file.
    """
    # A name of its own: another process may be writing the same file.
    partial = target.with_name(f".partial-{uuid.uuid4().hex[:12]}{target.suffix}")
    try:
        with naming(target):
            write(partial)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file, UTF-8, as `write_beside` does."""
    write_beside(target, lambda partial: partial.write_text(text, "utf-8"))


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, and rename it to `target` when it is whole.

    Raises:
        UsageError: `target` exists, or cannot be made.
        OSError: it cannot be written; the error names a file.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name a new folder")
    make_folder(target.parent)
    with naming(target), scratch_folder(target, "partial") as scratch:
        partial = scratch / "new"
        partial.mkdir()
        yield partial
        if target.exists():  # another process was quicker
            raise UsageError(f"{target}: exists already; name a new folder")
        partial.replace(target)


def check_target(target: Path, own: Callable[[Path], bool] = lambda target: True) -> None:
    """Find out before long work that a file cannot be written there.

    Args:
        own: tells a file that an earlier run of the command wrote, which may be replaced. So may an empty one.

    Raises:
        UsageError: its folder is not there, it is something else than a file, or somebody else's file.
    """
    if target.exists() and not target.is_file():
        raise UsageError(f"{target}: is a folder or a device; name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder")
    if target.exists() and target.stat().st_size and not own(target):
        raise UsageError(f"{target}: exists, and this command did not write it; name another file")


def check_source(source: Path) -> None:
    """Find out whether there is a file to read.

    Raises:
        UsageError: there is none, or something else than a file.
    """
    if not source.is_file():
        raise UsageError(f"{source}: {'not a file' if source.exists() else 'no such file'}")
