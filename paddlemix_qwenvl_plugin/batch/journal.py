"""Journal of a batch job, the partial file: output lines in order of completion.

Its first line identifies the job. The file is locked against a second process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from paddlemix_qwenvl_plugin.batch.rows import dump, result_id
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, naming


class Journal:
    """Output lines on disk, by the `id_key` (rows.py) of their rows.

    Opening truncates the file at the first line that is not a complete result (an answer or an error) of the job, or
    repeats one; a killed process may leave an incomplete line. Closing a journal without output lines removes its file.

    Raises:
        QwenVLError: another process holds the lock, or the file belongs to another job.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], keys: Collection[str]) -> None:
        """Open and lock the file.

        Args:
            job: identity of the job, JSON-serializable.
            keys: `id_key` of each row that has an id; an invalid row may have none, and gets no line here.
        """
        self._path = path
        self._file = _open_locked(path)
        self._locations: dict[str, tuple[int, int]] = {}  # key -> (offset, size in bytes)
        self._belongs_to_job = False
        try:
            with naming(path):
                self._resume(dump(job), keys)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    def line(self, key: str) -> bytes:
        """Read the output line of a row, line end included."""
        offset, size = self._locations[key]
        self._file.seek(offset)
        return self._file.read(size)

    def append(self, lines: Iterable[tuple[str, bytes]]) -> None:
        """Append (key, output line) pairs and sync them to disk."""
        with naming(self._path):
            offset = self._file.seek(0, os.SEEK_END)
            for key, line in lines:
                self._file.write(line)
                self._locations[key] = (offset, len(line))
                offset += len(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _resume(self, identity_line: bytes, keys: Collection[str]) -> None:
        self._file.seek(0)
        first_line = self._file.readline()
        if first_line != identity_line:
            if not identity_line.startswith(first_line):
                change = difference(json.loads(identity_line), first_line)
                raise QwenVLError(f"{self._path}: {change}; remove it or name another output")
            self._belongs_to_job = True
            self._file.truncate(0)  # new, or killed while writing the first line
            self._file.write(identity_line)
            self._file.flush()
            return
        self._belongs_to_job = True
        offset = len(identity_line)
        for line in self._file:
            result = result_id(line)
            if result is None or result[0] not in keys or result[0] in self._locations:
                break
            self._locations[result[0]] = (offset, len(line))
            offset += len(line)
        self._file.truncate(offset)

    def _close(self) -> None:
        if self._belongs_to_job and not self._locations:
            # Windows does not remove open files: the first line remains.
            with contextlib.suppress(PermissionError):
                self._path.unlink(missing_ok=True)
        with naming(self._path):
            self._file.close()


def difference(expected: Mapping[str, Any], found: bytes, kind: str = "partial file") -> str:
    """Describe how the identity of a job in a file, `found`, differs from that of the current job, `expected`.

    `kind`: the expected kind of file, for the message: a partial file, or the manifest of a job on a cluster.
    """
    try:
        actual = dict(json.loads(found))
    except (ValueError, TypeError):
        actual = {}
    if set(actual) != set(expected):
        return f"not a {kind} of this version of qwenvl batch"
    different = [key for key in expected if actual[key] != expected[key]]
    return f"belongs to another job (different: {', '.join(different)})"


def _open_locked(path: Path) -> BinaryIO:
    """Open or create the file and lock it until it is closed or the process ends."""
    while True:
        file = path.open("a+b")
        try:
            _lock(file)
        except BlockingIOError as error:
            file.close()
            raise QwenVLError(f"{path}: another qwenvl batch is writing it; wait for its end") from error
        # The previous owner may have removed the file between the open and the lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


if sys.platform == "win32":

    def _lock(file: BinaryIO) -> None:
        import msvcrt

        file.seek(2**31 - 2)  # beyond the data: a locked byte cannot be read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(str(error)) from error

else:

    def _lock(file: BinaryIO) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
