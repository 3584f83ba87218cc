"""JSONL files of data sets and predictions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from paddlemix_qwenvl_plugin.checkpoint.config import first_problem
from paddlemix_qwenvl_plugin.evaluation.ask import Question
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import check_source, write_beside
from paddlemix_qwenvl_plugin.util.sources import is_address

Id = Union[StrictInt, StrictStr]


class Row(BaseModel):
    """Row of a data set; extra keys are allowed.

    Attributes:
        image: path, absolute or relative to the working directory, or a `data:` or `file://` URL.
    """

    model_config = ConfigDict(frozen=True)

    image: str = Field(min_length=1)

    def key(self, number: int) -> Id:
        """The id of the row on line `number` of its file."""
        raise NotImplementedError

    def prompt(self) -> Question:
        """The prompt of the row."""
        raise NotImplementedError


class _Prediction(BaseModel):
    id: Id
    text: str


RowKind = TypeVar("RowKind", bound=Row)


def read_rows(path: Path, kind: type[RowKind]) -> dict[Id, RowKind]:
    """Read the rows of a JSONL file by id, in order; blank lines are skipped.

    Raises:
        UsageError: the file does not exist or has no rows, a row is invalid, or two rows have the same id.
    """
    rows: dict[Id, RowKind] = {}
    for number, row in _read(path, kind):
        _add(rows, row.key(number), row, f"{path}, line {number}")
    return rows


def check_images(path: Path, rows: Mapping[Id, Row]) -> None:
    """Check that all image files exist, before the model runs; URLs are not checked.

    Raises:
        UsageError: an image is missing; the message names the first.
    """
    for row_id, row in rows.items():
        if not is_address(row.image) and not Path(row.image).exists():
            raise UsageError(f"{path}, id {row_id!r}: image {row.image} does not exist")


def read_predictions(path: Path, ids: Iterable[Id]) -> dict[Id, str]:
    """Read the answers of a JSONL file with `id` and `text` in each line, in the order of `ids`.

    Raises:
        UsageError: the file does not exist or has no rows, a line is malformed, or an id is missing, duplicate or
            unknown.
    """
    texts: dict[Id, str] = {}
    for number, prediction in _read(path, _Prediction):
        _add(texts, prediction.id, prediction.text, f"{path}, line {number}")
    answers: dict[Id, str] = {}
    for row_id in ids:
        if row_id not in texts:
            raise UsageError(f"{path}: has no answer to id {row_id!r}")
        answers[row_id] = texts.pop(row_id)
    if texts:
        raise UsageError(f"{path}: answers id {next(iter(texts))!r}, which the data does not have")
    return answers


def write_predictions(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file; each of `lines` has `id`, `text` and further keys."""
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    # A lone surrogate has no UTF-8 form; its backslash form is the JSON escape.
    write_beside(path, lambda partial: partial.write_text(text, "utf-8", "backslashreplace"))


def is_scored(path: Path) -> bool:
    """Whether `qwenvl eval` wrote this file, by its first line: `--output` replaces no other file with content."""
    with path.open("rb") as file:
        try:
            line = json.loads(file.readline(1 << 22))  # at most 4 MiB: the file may be anything
        except (ValueError, RecursionError):
            return False
    return (
        isinstance(line, dict)
        and {"id", "text"} <= set(line)
        and not {"score", "words_right"}.isdisjoint(line)
    )


_Kind = TypeVar("_Kind", bound=BaseModel)
_Value = TypeVar("_Value")


def _read(path: Path, kind: type[_Kind]) -> Iterator[tuple[int, _Kind]]:
    check_source(path)
    n_rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            n_rows += 1
            where = f"{path}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(values, dict):
                raise UsageError(f"{where}: must be a JSON object")
            try:
                yield number, kind.model_validate(values)
            except ValidationError as error:
                raise UsageError(f"{where}: {first_problem(error)}") from error
    if not n_rows:
        raise UsageError(f"{path}: has no rows")


def _add(values: dict[Id, _Value], row_id: Id, value: _Value, where: str) -> None:
    if row_id in values:
        raise UsageError(f"{where}: duplicate id {row_id!r}")
    values[row_id] = value
