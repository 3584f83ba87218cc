"""Actor of a batch job: opens a model and answers parts with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.batch.answers import Answers
from paddlemix_qwenvl_plugin.batch.rows import Row, id_key
from paddlemix_qwenvl_plugin.cluster.batch.files import exists, join, write
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry, Format
from paddlemix_qwenvl_plugin.cluster.batch.images import with_images
from paddlemix_qwenvl_plugin.cluster.batch.parts import Part, digest_of_ids
from paddlemix_qwenvl_plugin.runtime.model import Model
from paddlemix_qwenvl_plugin.util import threads
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of


@dataclass(frozen=True)
class Work:
    """Arguments of an actor, the same for all parts.

    Attributes:
        open_model: opens the model; picklable.
        identity: the job's input, options and model (`identity` in batch/job.py).
        folder, format: folder and format of the input.
        target: path or URL of the output folder.
        window: number of concurrent rows.
        cpus: number of CPUs per actor, possibly fractional.
    """

    open_model: Callable[[], Model[Any]]
    identity: Mapping[str, Any]
    folder: str
    format: Format
    target: str
    window: int
    cpus: float


def open_with(open_model: Callable[[], Model[Any]], cpus: float) -> Model[Any]:
    """Open a model that computes with `cpus` threads, rounded up, unless the user has set OMP_NUM_THREADS."""
    threads.limit(max(1, math.ceil(cpus)))
    return open_model()


class Worker:
    """Ray Data actor. Returns expected errors as results: Ray would retry or wrap an exception."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Answer the only part of `batch`; return its number of rows, or an error as one line with its exit code."""
        part = Part.load(str(batch["part"][0]))
        try:
            self._answer(part)
        except (QwenVLError, OSError, MemoryError) as error:
            return {"rows": [0], "error": [line_of(error)], "exit_code": [getattr(error, "exit_code", 1)]}
        return {"rows": [part.n_rows], "error": [""], "exit_code": [0]}

    @cached_property
    def _answers(self) -> Answers[Any]:
        work = self._work
        model = open_with(work.open_model, work.cpus)
        if model.weights != work.identity["weights"]:
            raise QwenVLError(
                "the weights of an actor differ from those of the job; copy the same stages to all nodes"
            )
        model.load()
        # If the folder is a URL, `with_images` loads the images in it, and this path is not used.
        return Answers(model, Path(work.folder), work.identity)

    def _answer(self, part: Part) -> None:
        work = self._work
        if exists(join(work.target, part.name)):  # Ray repeats a part whose actor or result was lost
            return
        numbers, ids = list[int](), list[str]()

        def rows() -> Iterator[tuple[int, Row]]:
            for number, row in with_images(self._rows(part), work.folder, ahead=2 * work.window):
                numbers.append(number)
                ids.append(id_key(row.id))
                yield number, row

        lines = {}
        for finished in self._answers.lines(rows(), work.window):
            for number, _, line in finished:
                lines[number] = line
        if digest_of_ids(ids) != part.ids:
            names = " and ".join(dict.fromkeys(join(work.folder, span.name) for span in part.spans))
            raise QwenVLError(f"{names}: was changed while it was being read; start again")
        write(join(work.target, part.name), b"".join(lines[number] for number in numbers))

    def _rows(self, part: Part) -> Iterator[tuple[int, Row]]:
        """Yield the rows of a part as (number in the job, row)."""
        for span in part.spans:
            entry = Entry(span.number, span.start, span.stop)
            for number, row in self._work.format.rows(self._work.folder, span.name, entry):
                yield span.base + number, row
