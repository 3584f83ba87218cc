"""The work folder of a quantization, from which the same command resumes after an interruption."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from paddlemix_qwenvl_plugin.checkpoint.config import read_json
from paddlemix_qwenvl_plugin.util.errors import UsageError, make_folder, naming
from paddlemix_qwenvl_plugin.util.files import write_text

# Version of the files in the folder: increased when a change of the code produces other files from the same inputs.
_VERSION = 2


class Work:
    """Work folder `TARGET.partial`: the unfinished model folder, the hidden states before the next layer, the progress.

    Attributes:
        model: the unfinished model folder, renamed to TARGET when it is complete.
        figures: figures of the finished layers for the report, one dict per layer.
        embedded: whether the states before the next layer are saved; false until the embeddings are.
    """

    def __init__(self, folder: Path, figures: list[dict[str, Any]], embedded: bool) -> None:
        self._folder = folder
        self.model = folder / "model"
        self.figures = figures
        self.embedded = embedded

    @property
    def layers(self) -> int:
        """Number of finished layers."""
        return len(self.figures)

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: Path, settings: dict[str, Any]) -> Iterator[Work]:
        """Create the work folder next to `target`, or reopen the one of an interrupted run with the same settings.

        At the end of the block, a work folder without saved progress is removed.

        Args:
            target: the model folder to create.
            settings: digests of the inputs, and the options that determine the result; JSON-serializable.

        Raises:
            UsageError: `target` exists, or its parent cannot be created; or the work folder exists and was not written
                by this class, belongs to a running process, or is of a run with other settings.
            QwenVLError: job.json or progress.json in the work folder cannot be read.
            OSError: a file in the work folder cannot be written.
        """
        if target.exists():
            raise UsageError(f"{target}: exists already; name a new folder")
        make_folder(target.parent)
        folder = target.with_name(f"{target.name}.partial")
        settings = {"version": _VERSION, **settings}
        job = folder / "job.json"
        if folder.exists() and not job.is_file():
            raise UsageError(f"{folder}: exists, and this command did not write it; move it away")
        if folder.exists() and read_json(job) != settings:
            raise UsageError(
                f"{folder}: an interrupted run with other settings; remove it, or name another folder"
            )
        with naming(folder):
            (folder / "model").mkdir(parents=True, exist_ok=True)
            if not job.is_file():
                write_text(job, json.dumps(settings))
            try:
                with FileLock(folder / "lock", timeout=0):
                    work = cls(folder, *_progress(folder))
                    try:
                        yield work
                    finally:
                        if not work.embedded:
                            shutil.rmtree(folder, ignore_errors=True)
            except Timeout as error:
                raise UsageError(f"{folder}: another process is writing it; wait for it") from error

    def states(self, name: str) -> Path:
        """Path of a file of hidden states."""
        return self._folder / f"{name}.bin"

    def save(self, kept: set[Path]) -> None:
        """Record the progress, then remove all files of hidden states but `kept`."""
        write_text(self._folder / "progress.json", json.dumps({"figures": self.figures}))
        self.embedded = True
        for path in self._folder.glob("*.bin"):
            if path not in kept:
                path.unlink()

    def finish(self, target: Path) -> None:
        """Rename the model folder to `target` and remove the work folder."""
        self.model.rename(target)
        shutil.rmtree(self._folder, ignore_errors=True)


def _progress(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The attributes `figures` and `embedded` of an interrupted run, or of a new one."""
    path = folder / "progress.json"
    return (read_json(path)["figures"], True) if path.is_file() else ([], False)
