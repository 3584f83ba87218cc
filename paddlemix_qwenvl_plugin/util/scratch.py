"""Scratch folders next to their target, with removal of those left by killed processes."""

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
    """Create a folder `.KIND-NAME-…` next to `target` and remove it at the end of the block.

    First remove such folders left by killed processes. A folder is in use while its lock is held; the lock ends with
    the process.
    """
    name, unnamed = f".{kind}-{target.name}-", f".{kind}-new-"
    for stale in target.parent.glob(f"{glob.escape(name)}*/{_LOCK}"):
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(stale, timeout=0):
            shutil.rmtree(stale.parent, ignore_errors=True)
    # Lock before the rename to the final name, so that no other process removes the folder as stale.
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=unnamed))
    try:
        with FileLock(new / _LOCK):
            new = new.rename(new.with_name(new.name.replace(unnamed, name)))
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
