"""Execution of a batch job: results go to a journal as they complete, then to the output in input order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic

from paddlemix_qwenvl_plugin.batch.answers import Answers
from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.batch.rows import id_key, result_id
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.model import Model, S
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.progress import track


def partial_path(target: Path) -> Path:
    """Path of the partial file of an output."""
    return target.with_name(f"{target.name}.partial")


def identity(
    digest: str, options: GenerationOptions, weights: Sequence[str], picture_label: str
) -> dict[str, Any]:
    """Identify a job by its input, default options and model; changes of image files are not noticed.

    The identity is the first line of the partial file, and belongs to the manifest of a job on a cluster.

    Args:
        digest: digest of the input.
        options: generation options of rows that do not set them.
        weights, picture_label: attributes of the model (runtime/model.py).
    """
    return {
        "qwenvl_batch": 1,  # version of the identity
        "input": digest,
        "options": asdict(options),
        "weights": [*weights],
        "picture_label": picture_label,
    }


def run(source: Source, target: Path, model: Model[S], window: int) -> None:
    """Answer every row of `source` into `target`; resume the job if an earlier process left its partial file.

    Args:
        window: number of concurrent rows.

    Raises:
        QwenVLError: another process or another job owns the partial file, the model cannot be run, or the input has
            changed. The partial file keeps the results so far.
        OSError: a file cannot be written.
    """
    job = identity(source.sha256, source.defaults, model.weights, model.picture_label)
    keys = {id_key(entry.id) for entry in source.entries if entry.id is not None}
    partial = partial_path(target)
    with Journal(partial, job, keys) as journal:
        if not target.exists():  # else another process has completed the job since the caller's check
            _Job(source, Answers(model, source.path.parent, job), journal).run(target, window)
    partial.unlink(missing_ok=True)


def count_failed(target: Path, source: Source) -> int:
    """Count the failed rows in a complete output.

    Raises:
        UsageError: the file is not the output of `source`.
    """
    with target.open("rb") as file:
        results = [result_id(line) for line in file]
    output_ids = [result[0] if result else None for result in results]
    if output_ids != [id_key(entry.id) for entry in source.entries]:
        raise UsageError(
            f"{target}: exists, and is not the output of {source.path}; remove it or name another output"
        )
    return sum(result is not None and result[1] for result in results)


class _Job(Generic[S]):
    def __init__(self, source: Source, answers: Answers[S], journal: Journal) -> None:
        self._source = source
        self._answers = answers
        self._journal = journal

    def run(self, target: Path, window: int) -> None:
        entries = self._source.entries
        if len(self._journal):
            print(f"resuming: {len(self._journal)} of {len(entries)} rows are answered", file=sys.stderr)
        remaining = [
            i for i, entry in enumerate(entries) if entry.id is not None and self._key(i) not in self._journal
        ]
        # Rows with the same images run consecutively, so that the caches serve them.
        remaining.sort(key=lambda i: entries[i].images)
        for _ in track(self._answer(remaining, window), "rows answered", len(remaining)):
            pass
        write_beside(target, self._write)

    def _answer(self, indices: Sequence[int], window: int) -> Iterator[None]:
        """Answer rows into the journal; yield once for each."""
        rows = ((self._source.entries[index].number, self._source.row(index)) for index in indices)
        for finished in self._answers.lines(rows, window):
            self._journal.append((id_key(row.id), line) for _, row, line in finished)
            yield from [None] * len(finished)

    def _key(self, index: int) -> str:
        return id_key(self._source.entries[index].id)

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            for index, entry in enumerate(self._source.entries):
                if entry.id is not None:
                    file.write(self._journal.line(self._key(index)))
                else:  # a row without an id is not in the journal: read its error again
                    row = self._source.row(index)
                    assert isinstance(row.parsed, UsageError)
                    file.write(self._answers.error_line(entry.number, row, row.parsed))
            file.flush()
            os.fsync(file.fileno())
