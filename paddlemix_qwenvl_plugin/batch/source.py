"""The input of a batch job: a JSONL file that is read once for its ids, and then row by row."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from paddlemix_qwenvl_plugin.batch.request import RowId
from paddlemix_qwenvl_plugin.batch.rows import Row, id_key, read_row
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util import standard_input
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import check_source

STANDARD = Path("-")
"""What stands for standard input, or output, in the place of a file."""


class Entry(NamedTuple):
    """Where a row is. Rows themselves are not kept: a data URL in each would fill the memory.

    `images` are numbers in the order in which the input first names them.
    """

    number: int
    offset: int
    checksum: int
    id: RowId
    openai: bool
    images: tuple[int, ...]


class Source:
    """The rows of a file; blank lines are no rows.

    Attributes:
        path: of the file, relative paths of images start from its folder; `-`: standard input is copied first.
        entries: one a row.
        defaults: the options of rows that have none of their own.
        sha256: of the whole file.

    Raises:
        UsageError: no such file, or two rows of one id.
    """

    def __init__(self, path: Path, defaults: GenerationOptions) -> None:
        self.path = path
        if path == STANDARD:
            name, self._file = standard_input.NAME, standard_input.copied()
        else:
            check_source(path)
            name, self._file = str(path), path.open("rb")
        self.entries: list[Entry] = []
        self.defaults = defaults
        values = asdict(defaults)
        digest, offset, numbers = hashlib.sha256(), 0, dict[str, int]()
        images: dict[int, int] = {}
        for number, line in enumerate(self._file, start=1):
            digest.update(line)
            if line.strip():
                row = read_row(number, line, values)
                named = tuple(images.setdefault(hash(image), len(images)) for image in _images(row))
                self.entries.append(Entry(number, offset, hash(line), row.id, row.openai, named))
                if row.id is not None:
                    first = numbers.setdefault(id_key(row.id), number)
                    if first != number:
                        raise UsageError(f"{name}: lines {first} and {number} have the same id {row.id!r}")
            offset += len(line)
        self.sha256 = digest.hexdigest()

    def row(self, index: int) -> Row:
        """The row of `entries[index]`.

        Raises:
            QwenVLError: the file has changed.
        """
        entry = self.entries[index]
        self._file.seek(entry.offset)
        line = self._file.readline()
        if hash(line) != entry.checksum:
            raise QwenVLError(f"{self.path}: was changed while it was being read; start again")
        return read_row(entry.number, line, asdict(self.defaults))


def _images(row: Row) -> list[str]:
    """The addresses of a row's images."""
    if isinstance(row.asked, UsageError):
        return []
    request = row.asked.request
    queries = [*(query for query, _ in request.history), request.parts]
    return [
        part["image"] for query in queries for part in query if not isinstance(part, str) and "image" in part
    ]
