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

    Folders of this target and kind that killed processes left are removed first. A folder is in use while its lock is
    held, and the lock ends with the process.
    """
    prefix, unlocked_prefix = f".{kind}-{target.name}-", f".{kind}-new-"
    for lock in target.parent.glob(f"{glob.escape(prefix)}*/{_LOCK}"):
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(lock, timeout=0):
            shutil.rmtree(lock.parent, ignore_errors=True)
    # Locked before it gets a name that the loop above matches: another process would remove the unlocked folder.
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=unlocked_prefix))
    try:
        with FileLock(folder / _LOCK):
            folder = folder.rename(folder.with_name(folder.name.replace(unlocked_prefix, prefix)))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
