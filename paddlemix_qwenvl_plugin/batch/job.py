"""Run a batch job: plan, answer batch by batch into the partial file, write the output in the input's order."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from paddlemix_qwenvl_plugin.batch.journal import Journal
from paddlemix_qwenvl_plugin.batch.request import Reply, Request
from paddlemix_qwenvl_plugin.batch.rows import Row, dump, error_line, id_key, reply_line, result_id
from paddlemix_qwenvl_plugin.batch.source import Source
from paddlemix_qwenvl_plugin.processing.prompts import Prompt
from paddlemix_qwenvl_plugin.runtime.answer import answer_of
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.predictor import DEFAULT_SYSTEM, QwenVL
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import write_beside
from paddlemix_qwenvl_plugin.util.progress import track

# Within so many tokens of length, rows about one picture go together, so that the picture is still remembered: to pad
# a prompt costs less than to encode a picture again.
_SIMILAR_TOKENS = 64

_ADDRESS = re.compile(r"data:|https?:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class Planned:
    """A row that can be run: its index in the input, and what decides with which others it is run.

    `options` are cut to the room that its own prompt leaves, so that no longer row of a batch cuts them for it.
    `pictures` are numbers in the order in which the input first names them.
    """

    index: int
    n_tokens: int
    options: GenerationOptions
    chat: bool
    pictures: tuple[int, ...]


def make_batches(planned: Sequence[Planned], batch_size: int) -> list[list[Planned]]:
    """Batches of at most `batch_size` rows with the same options and form, longest prompts first."""
    groups: dict[tuple[GenerationOptions, bool], list[Planned]] = {}
    for row in planned:
        groups.setdefault((row.options, row.chat), []).append(row)
    batches = []
    for rows in groups.values():
        rows.sort(key=lambda row: (-(row.n_tokens // _SIMILAR_TOKENS), row.pictures, -row.n_tokens))
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def partial_path(target: Path) -> Path:
    """The partial file beside an output."""
    return target.with_name(f"{target.name}.partial")


def run(source: Source, target: Path, model: QwenVL, options: GenerationOptions, batch_size: int) -> None:
    """Answer every row of `source` into `target`, and continue where an earlier process of the same job ended.

    Args:
        options: those with which `source` was opened.

    Raises:
        QwenVLError: another process or another job has the partial file, or the exported stages cannot be run. What
            was answered until then stays in the partial file.
        OSError: a file cannot be written.
    """
    job = {
        "qwenvl_batch": 1,
        "input": source.sha256,
        "options": asdict(options),
        "weights": model.weights,
    }
    keys = {id_key(entry.id) for entry in source.entries if entry.id is not None}
    partial = partial_path(target)
    with Journal(partial, job, keys) as journal:
        if not target.exists():  # else another process has ended the job since the caller looked
            _Job(source, model, journal, hashlib.sha256(dump(job)).hexdigest()).run(target, batch_size)
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


class _Job:
    def __init__(self, source: Source, model: QwenVL, journal: Journal, digest: str) -> None:
        self._source = source
        self._model = model
        self._journal = journal
        self._digest = digest
        self._errors: dict[int, QwenVLError] = {}

    def run(self, target: Path, batch_size: int) -> None:
        n_rows, n_before = len(self._source.entries), len(self._journal)
        if n_before:
            print(f"{n_before} of {n_rows} rows are there from before", file=sys.stderr)
        batches = make_batches(list(self._plan()), batch_size)
        n_left = sum(not self._done(row.index) for batch in batches for row in batch)
        for _ in track(self._answer_all(batches), "rows answered", n_left):
            pass
        write_beside(target, self._write)

    def _plan(self) -> Iterator[Planned]:
        """The rows that can be run. What is wrong with the others is found again each time, and not journaled."""
        pictures: dict[int, int] = {}
        for index in range(len(self._source.entries)):
            request = self._source.row(index).request
            try:
                if isinstance(request, UsageError):
                    raise request
                prompt, _ = self._prompt(request)
                options = self._model.fit(len(prompt.input_ids), request.options)
            except QwenVLError as error:
                self._errors[index] = error
                continue
            numbers = tuple(pictures.setdefault(hash(image), len(pictures)) for image in prompt.images)
            yield Planned(index, len(prompt.input_ids), options, request.chat, numbers)

    def _prompt(self, request: Request) -> tuple[Prompt, list[int]]:
        system = DEFAULT_SYSTEM if request.system is None else request.system
        return self._model.prompt(request.query, chat=request.chat, history=request.history, system=system)

    def _answer_all(self, batches: list[list[Planned]]) -> Iterator[int]:
        """Answer what is left into the journal; yields the index of each row."""
        for batch in batches:
            left = {row.index for row in batch if not self._done(row.index)}
            if left:
                # The whole batch, also where a killed process has written a part of it: matrix products of another
                # height may round otherwise, and a result must not depend on the moment of the kill.
                lines = self._answer(batch)
                self._journal.append((self._key(index), lines[index]) for index in sorted(left))
                yield from left

    def _answer(self, batch: list[Planned]) -> dict[int, bytes]:
        """The output line of each row, by its index."""
        lines: dict[int, bytes] = {}
        ready: list[tuple[int, Row, Request, Prompt]] = []
        pixels, sizes = [], []
        ends: list[int] = []
        for planned in batch:
            row = self._source.row(planned.index)
            assert isinstance(row.request, Request)
            prompt, ends = self._prompt(row.request)
            try:
                images = self._model.load_images([self._located(image) for image in prompt.images])
            except QwenVLError as error:
                lines[planned.index] = error_line(row.id, row.openai, error, self._tag(planned.index))
                continue
            pixels.append(self._model.preprocess(images))
            sizes.append(images[-1].size if images else None)
            ready.append((planned.index, row, row.request, prompt))
        if not ready:
            return lines
        lengths = [len(prompt.input_ids) for *_, prompt in ready]
        ids = np.zeros([len(ready), max(lengths)], np.int64)
        for place, (*_, prompt) in zip(ids, ready):
            place[: len(prompt.input_ids)] = prompt.input_ids
        features = self._model.encode_images(np.concatenate(pixels))
        answers = self._model.generate_ids(
            ids, features, lengths=lengths, eos_token_ids=ends, **asdict(batch[0].options)
        )
        for (index, row, request, prompt), tokens, size in zip(ready, answers, sizes):
            reason = "stop" if tokens[-1] in ends else "length"
            answer = answer_of(self._model.tokenizer, tokens, ends, size, reason, {})
            reply = Reply(answer, len(prompt.input_ids), request.model)
            lines[index] = reply_line(row.id, row.openai, reply, self._tag(index))
        return lines

    def _located(self, image: str) -> str:
        """A path relative to the input's folder as one relative to the working directory."""
        return image if _ADDRESS.match(image) else str(self._source.path.parent / image)

    def _key(self, index: int) -> str:
        return id_key(self._source.entries[index].id)

    def _done(self, index: int) -> bool:
        return self._key(index) in self._journal

    def _tag(self, index: int) -> str:
        """A request's name: the same when a killed job is run again, another in another job."""
        number = self._source.entries[index].number
        return hashlib.sha256(f"{self._digest} {number}".encode()).hexdigest()[:24]

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            for index, entry in enumerate(self._source.entries):
                error = self._errors.get(index)
                if error is not None:
                    file.write(error_line(entry.id, entry.openai, error, self._tag(index)))
                else:
                    file.write(self._journal.line(self._key(index)))
            file.flush()
            os.fsync(file.fileno())
