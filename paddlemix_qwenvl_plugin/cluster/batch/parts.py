"""Division of a job's rows into parts; one actor answers a part and writes it as one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from paddlemix_qwenvl_plugin.batch.request import RowId
from paddlemix_qwenvl_plugin.batch.rows import id_key
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry


@dataclass(frozen=True)
class Span:
    """Consecutive rows of an input file.

    Attributes:
        name: name of the file.
        base: number of rows in all earlier files (in JSONL, of lines up to each file's last row); base + a row's number
            in the file is its number in the job.
        number: number of the first row in the file, from 1; in JSONL, of its line.
        start, stop: the range [start, stop) of the rows in the file, in the unit of the format: bytes, or rows from 0.
    """

    name: str
    base: int
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Unit of work of a job: consecutive rows, answered by one actor into one file.

    Attributes:
        index: number of the part, from 0.
        spans: the rows, by file.
        n_rows: number of rows.
        ids: `digest_of_ids` of the row ids, with which the rows read and the results written are checked.
    """

    index: int
    spans: list[Span]
    n_rows: int
    ids: str

    @property
    def name(self) -> str:
        """Name of the part's file in the output folder."""
        return f"part-{self.index:05}.jsonl"

    def dump(self) -> str:
        """Serialize the part as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Part:
        """Parse a part serialized by `dump`."""
        values = json.loads(text)
        return cls(**{**values, "spans": [Span(**span) for span in values["spans"]]})


def digest_of_ids(ids: Iterable[str]) -> str:
    """Compute a digest of row ids (`id_key`), in order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def cut(rows: Iterable[tuple[str, Entry]], n_rows: int) -> Iterator[Part]:
    """Divide rows, as (file name, entry), into parts of `n_rows` rows; the last part may have fewer."""
    spans, ids = list[Span](), list[RowId]()
    index, base, last_number, previous_name = 0, 0, 0, None
    for name, entry in rows:
        if name != previous_name:
            base, previous_name = base + last_number, name
        last_number = entry.number
        if spans and spans[-1].name == name:
            span = spans.pop()
            spans.append(Span(name, base, span.number, span.start, entry.stop))
        else:
            spans.append(Span(name, base, entry.number, entry.start, entry.stop))
        ids.append(entry.row_id)
        if len(ids) == n_rows:
            yield Part(index, spans, len(ids), digest_of_ids(map(id_key, ids)))
            index, spans, ids = index + 1, [], []
    if ids:
        yield Part(index, spans, len(ids), digest_of_ids(map(id_key, ids)))
