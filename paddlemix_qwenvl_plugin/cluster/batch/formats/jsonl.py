"""JSONL files: one request per line, in the plain form (this package's format of a row) or in OpenAI's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paddlemix_qwenvl_plugin.batch.rows import Row, read_row
from paddlemix_qwenvl_plugin.cluster.batch.files import join, opened
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry


class Jsonl:
    """Format of JSONL files; `start` and `stop` of an Entry are byte offsets in the file. Blank lines are skipped."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the rows of a JSONL file."""
        offset = 0
        with opened(join(folder, name)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = read_row(number, line, self._defaults)
                    yield Entry(number, offset, offset + len(line), row.id)
                offset += len(line)

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Read the rows in a range of byte offsets, as (line number, row)."""
        with opened(join(folder, name)) as file:
            file.seek(entry.start)
            number, offset = entry.number, entry.start
            while offset < entry.stop and (line := file.readline()):
                if line.strip():
                    yield number, read_row(number, line, self._defaults)
                number, offset = number + 1, offset + len(line)
