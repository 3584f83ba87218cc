"""The folder in which an export writes, beside where its files go, and what killed exports left of theirs."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = "lock"


@contextlib.contextmanager
def scratch_folder(prefix: Path) -> Iterator[Path]:
    """A folder beside PREFIX's files, gone in the end; those that killed exports of this prefix left go first.

    A folder is in use as long as its lock is held, which ends with the process.
    """
    name = f".export-{prefix.name}-"
    for left in prefix.parent.glob(f"{name}*/{_LOCK}"):
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    # Locked before it has its name, so that nobody takes it for one that was left.
    new = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=".export-new-"))
    try:
        with FileLock(new / _LOCK):
            new = new.rename(new.with_name(new.name.replace(".export-new-", name)))
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
