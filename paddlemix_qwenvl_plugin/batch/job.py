"""Run a batch job: answer row by row into the partial file, a window of rows at once; write them in their order."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Generic

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.batch.request import Asked, Reply
from paddlemix_qwenvl_plugin.batch.rows import Row, dump, error_line, id_key, reply_line, result_id
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.runtime.model import Model, S
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, RequestError, UsageError
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.progress import track


def partial_path(target: Path) -> Path:
    """The partial file beside an output."""
    return target.with_name(f"{target.name}.partial")


def run(source: Source, target: Path, model: Model[S], window: int) -> None:
    """Answer every row of `source` into `target`, and continue where an earlier process of the same job ended.

    Args:
        window: rows that are run at once.

    Raises:
        QwenVLError: another process or another job has the partial file, or the exported stages cannot be run. What
            was answered until then stays in the partial file.
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
        if not target.exists():  # else another process has ended the job since the caller looked
            _Job(source, model, journal, hashlib.sha256(dump(job)).hexdigest()).run(target, window)
    partial.unlink(missing_ok=True)


def count_failed(target: Path, source: Source) -> int:
    """How many rows of a finished output are errors.

    Raises:
        UsageError: it is not an output of `source`.
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
            print(f"{len(self._journal)} of {len(entries)} rows are there from before", file=sys.stderr)
        left = [
            i for i, entry in enumerate(entries) if entry.id is not None and self._key(i) not in self._journal
        ]
        # Rows about one image one after another, so that what it costs is paid once.
        left.sort(key=lambda i: entries[i].images)
        for _ in track(self._answer(left, window), "rows answered", len(left)):
            pass
        write_beside(target, self._write)

    def _answer(self, indices: Sequence[int], window: int) -> Iterator[int]:
        """Answer rows into the journal, `window` of them at a time; yields the index of each."""
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
                finally:  # what was answered stays, whatever happened to another row
                    self._journal.append((self._key(index), line) for index, line in done)
                yield from (index for index, _ in done)
        finally:
            for stream in active:
                stream.close()

    def _start(self, row: Row) -> S:
        if isinstance(row.asked, UsageError):
            raise row.asked
        return self._model.ask(row.asked.request, self._source.path.parent).submit()

    def _reply(self, row: Row, stream: S, tag: str) -> bytes:
        assert isinstance(row.asked, Asked)
        try:
            answer = stream.finish()
        except RequestError as error:
            return error_line(row.id, row.openai, error, tag)
        reply = Reply(answer, stream.n_prompt_tokens, stream.n_new_tokens, row.asked.model)
        return reply_line(row.id, row.openai, reply, tag)

    def _key(self, index: int) -> str:
        return id_key(self._source.entries[index].id)

    def _tag(self, index: int) -> str:
        """A request's name: the same when a killed job is run again, another in another job."""
        number = self._source.entries[index].number
        return hashlib.sha256(f"{self._digest} {number}".encode()).hexdigest()[:24]

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            for index, entry in enumerate(self._source.entries):
                if entry.id is not None:
                    file.write(self._journal.line(self._key(index)))
                else:  # what is wrong with a row without an id is found again: it has no place in the journal
                    error = self._source.row(index).asked
                    assert isinstance(error, UsageError)
                    file.write(error_line(None, entry.openai, error, self._tag(index)))
            file.flush()
            os.fsync(file.fileno())
