"""A folder to write in, beside where its files go, and what killed processes left of theirs."""

from __future__ import annotations

import contextlib
import glob
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = "lock"


@contextlib.contextmanager
def scratch_folder(target: Path, kind: str) -> Iterator[Path]:
    """A folder `.KIND-NAME-…` beside `target`, gone in the end; those that killed processes left of it go first.

    A folder is in use as long as its lock is held, which ends with the process.
    """
    name, unnamed = f".{kind}-{target.name}-", f".{kind}-new-"
    for left in target.parent.glob(f"{glob.escape(name)}*/{_LOCK}"):
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    # Locked before it has its name, so that nobody takes it for one that was left.
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=unnamed))
    try:
        with FileLock(new / _LOCK):
            new = new.rename(new.with_name(new.name.replace(unnamed, name)))
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
