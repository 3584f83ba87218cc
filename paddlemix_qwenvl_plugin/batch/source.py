"""Input of a batch job on one machine: a JSONL file, indexed in one pass and then read by row."""

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
"""Path that denotes standard input or output."""


class Entry(NamedTuple):
    """Index entry of a row. Rows themselves are not kept in memory: each may contain data URLs.

    Attributes:
        number: line number, from 1.
        offset: offset of the line in the file, in bytes.
        checksum: hash of the line.
        id, openai: as in Row.
        images: numbers of the row's images, by which the job orders its rows; images are numbered by their first
            occurrence in the input. Two images with equal hashes share a number, which affects only the order.
    """

    number: int
    offset: int
    checksum: int
    id: RowId
    openai: bool
    images: tuple[int, ...]


class Source:
    """Indexed rows of a file; blank lines are skipped.

    Attributes:
        path: path of the file; relative image paths are resolved against its folder. `-`: standard input, which is
            copied to a temporary file; relative image paths then start in the working folder.
        entries: one entry per row.
        defaults: values of the generation options that a row does not set.
        sha256: hex digest of the whole file.

    Raises:
        UsageError: the path is no file, standard input is closed, or two rows have the same id.
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
        digest, offset = hashlib.sha256(), 0
        first_lines: dict[str, int] = {}  # id -> number of the line with this id
        image_numbers: dict[int, int] = {}  # hash of the image's source -> number
        for number, line in enumerate(self._file, start=1):
            digest.update(line)
            if line.strip():
                row = read_row(number, line, values)
                images = tuple(
                    image_numbers.setdefault(hash(image), len(image_numbers)) for image in images_of(row)
                )
                self.entries.append(Entry(number, offset, hash(line), row.id, row.openai, images))
                if row.id is not None:
                    first = first_lines.setdefault(id_key(row.id), number)
                    if first != number:
                        raise UsageError(f"{name}: lines {first} and {number} have the same id {row.id!r}")
            offset += len(line)
        self.sha256 = digest.hexdigest()

    def row(self, index: int) -> Row:
        """Read the row of `entries[index]`.

        Raises:
            QwenVLError: the file has changed.
        """
        entry = self.entries[index]
        self._file.seek(entry.offset)
        line = self._file.readline()
        if hash(line) != entry.checksum:
            raise QwenVLError(f"{self.path}: was changed while it was being read; start again")
        return read_row(entry.number, line, asdict(self.defaults))


def images_of(row: Row) -> list[str]:
    """List the sources of a row's images."""
    if isinstance(row.parsed, QwenVLError):
        return []
    request = row.parsed.request
    queries = [*(query for query, _ in request.history), request.parts]
    return [
        part["image"] for query in queries for part in query if not isinstance(part, str) and "image" in part
    ]
