"""Execution of a batch job: results go to a journal as they complete, then to the output in input order."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Generic

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.batch.request import Reply, RowRequest
from paddlemix_qwenvl_plugin.batch.rows import Row, dump, error_line, id_key, reply_line, result_id
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.model import Model, S
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, RequestError, UsageError
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.progress import track


def partial_path(target: Path) -> Path:
    """Path of the partial file of an output."""
    return target.with_name(f"{target.name}.partial")


def run(source: Source, target: Path, model: Model[S], window: int) -> None:
    """Answer every row of `source` into `target`; resume the job if an earlier process left its partial file.

    Args:
        window: number of concurrent rows.

    Raises:
        QwenVLError: another process or another job owns the partial file, or the exported stages cannot be run. The
            partial file keeps the results so far.
        OSError: a file cannot be written.
    """
    job = {
        "qwenvl_batch": 1,
        "input": source.sha256,
        "options": asdict(source.defaults),
        "weights": model.weights,
        "picture_label": model.picture_label,
    }
    keys = {id_key(entry.id) for entry in source.entries if entry.id is not None}
    partial = partial_path(target)
    with Journal(partial, job, keys) as journal:
        if not target.exists():  # else another process has completed the job since the caller's check
            _Job(source, model, journal, hashlib.sha256(dump(job)).hexdigest()).run(target, window)
    partial.unlink(missing_ok=True)


def count_failed(target: Path, source: Source) -> int:
    """Count the errors in a complete output.

    Raises:
        UsageError: the file is not the output of `source`.
    """
    with target.open("rb") as file:
        results = [result_id(line) for line in file]
    found = [result[0] if result else None for result in results]
    if found != [id_key(entry.id) for entry in source.entries]:
        raise UsageError(
            f"{target}: exists, and is not the output of {source.path}; remove it or name another output"
        )
    return sum(result is not None and result[1] for result in results)


class _Job(Generic[S]):
    def __init__(self, source: Source, model: Model[S], journal: Journal, digest: str) -> None:
        self._source = source
        self._model = model
        self._journal = journal
        self._digest = digest

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

    def _answer(self, indices: Sequence[int], window: int) -> Iterator[int]:
        """Answer rows into the journal, `window` at a time; yield the index of each."""
        active: dict[S, tuple[int, Row]] = {}
        todo = iter(indices)
        try:
            while True:
                done: list[tuple[int, bytes]] = []
                while len(active) < window and (index := next(todo, None)) is not None:
                    row = self._source.row(index)
                    try:
                        active[self._start(row)] = index, row
                    except QwenVLError as error:
                        done.append((index, error_line(row.id, row.openai, error, self._tag(index))))
                if not active and not done:
                    return
                try:
                    for stream in self._model.wait_any(active) if active else []:
                        index, row = active.pop(stream)
                        done.append((index, self._reply(row, stream, self._tag(index))))
                finally:  # keep completed rows even if another one raised
                    self._journal.append((self._key(index), line) for index, line in done)
                yield from (index for index, _ in done)
        finally:
            for stream in active:
                stream.close()

    def _start(self, row: Row) -> S:
        if isinstance(row.parsed, UsageError):
            raise row.parsed
        request, model = row.parsed.request, row.parsed.model
        if row.openai and model in self._model.adapters:  # as for a server
            request = replace(request, adapter=model)
        return self._model.ask(request, self._source.path.parent).submit()

    def _reply(self, row: Row, stream: S, tag: str) -> bytes:
        assert isinstance(row.parsed, RowRequest)
        try:
            answer = stream.finish()
        except RequestError as error:
            return error_line(row.id, row.openai, error, tag)
        reply = Reply(answer, stream.n_prompt_tokens, stream.n_new_tokens, row.parsed.model)
        return reply_line(row.id, row.openai, reply, tag)

    def _key(self, index: int) -> str:
        return id_key(self._source.entries[index].id)

    def _tag(self, index: int) -> str:
        """Request id, stable over restarts of the job and different in other jobs."""
        number = self._source.entries[index].number
        return hashlib.sha256(f"{self._digest} {number}".encode()).hexdigest()[:24]

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            for index, entry in enumerate(self._source.entries):
                if entry.id is not None:
                    file.write(self._journal.line(self._key(index)))
                else:  # a row without an id is not in the journal: read its error again
                    error = self._source.row(index).parsed
                    assert isinstance(error, UsageError)
                    file.write(error_line(None, entry.openai, error, self._tag(index)))
            file.flush()
            os.fsync(file.fileno())
