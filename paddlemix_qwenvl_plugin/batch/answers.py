"""Concurrent answers to the rows of a job, as output lines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

from paddlemix_qwenvl_plugin.batch.request import Reply, RowRequest
from paddlemix_qwenvl_plugin.batch.rows import Row, dump, error_line, reply_line
from paddlemix_qwenvl_plugin.runtime.model import Model, S
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, RequestError


class Answers(Generic[S]):
    """Answers the rows of a batch job as output lines.

    Args:
        model: the model that answers.
        folder: folder of relative image paths.
        job: identity of the job, JSON-serializable; with a row's number it gives the row's request id, which is stable
            over restarts of the job and different in other jobs.
    """

    def __init__(self, model: Model[S], folder: Path, job: Mapping[str, Any]) -> None:
        self._model = model
        self._folder = folder
        self._digest = hashlib.sha256(dump(job)).hexdigest()

    def lines(self, rows: Iterable[tuple[int, Row]], window: int) -> Iterator[list[tuple[int, Row, bytes]]]:
        """Answer up to `window` rows concurrently; yield lists of (number, row, output line) of completed rows.

        Args:
            rows: (number, row) pairs, read lazily.
            window: number of concurrent rows.

        Raises:
            QwenVLError: the model cannot be run. Rows completed before that have been yielded.
        """
        active: dict[S, tuple[int, Row]] = {}
        unstarted = iter(rows)
        try:
            while True:
                finished: list[tuple[int, Row, bytes]] = []
                try:
                    while len(active) < window and (numbered_row := next(unstarted, None)) is not None:
                        number, row = numbered_row
                        try:
                            stream = self._ask(row)
                        except QwenVLError as error:
                            finished.append((number, row, self.error_line(number, row, error)))
                        else:  # not in the `try`: the submission may load the model, and this error is no row's
                            active[stream.submit()] = numbered_row
                    if not active and not finished:
                        return
                    for stream in self._model.wait_any(active) if active else []:
                        number, row = active.pop(stream)
                        finished.append((number, row, self._reply(number, row, stream)))
                except BaseException:
                    yield finished
                    raise
                yield finished
        finally:
            for stream in active:
                stream.close()

    def error_line(self, number: int, row: Row, error: QwenVLError) -> bytes:
        """Format the output line of a failed row."""
        return error_line(row.id, row.openai, error, self._tag(number))

    def _ask(self, row: Row) -> S:
        if isinstance(row.parsed, QwenVLError):
            raise row.parsed
        request, model = row.parsed.request, row.parsed.model
        if row.openai and model in self._model.adapters:  # on the server, too, `model` selects an adapter
            request = replace(request, adapter=model)
        return self._model.ask(request, self._folder)

    def _reply(self, number: int, row: Row, stream: S) -> bytes:
        assert isinstance(row.parsed, RowRequest)
        try:
            answer = stream.finish()
        except RequestError as error:
            return self.error_line(number, row, error)
        reply = Reply(answer, stream.n_prompt_tokens, stream.n_new_tokens, row.parsed.model)
        return reply_line(row.id, row.openai, reply, self._tag(number))

    def _tag(self, number: int) -> str:
        return hashlib.sha256(f"{self._digest} {number}".encode()).hexdigest()[:24]
