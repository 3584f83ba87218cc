"""Parquet files: a column per key of the plain form, this package's format of a row (PLAIN_KEYS in entry.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.batch.request import RowId
from paddlemix_qwenvl_plugin.batch.rows import Row
from paddlemix_qwenvl_plugin.cluster.batch.files import join, opened
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import PLAIN_KEYS, Entry, data_url, plain_row
from paddlemix_qwenvl_plugin.util.errors import UsageError

_ROWS_PER_READ = 16  # few, because rows may contain encoded images


class Parquet:
    """Format of Parquet files; `start` and `stop` of an Entry are row numbers from 0.

    Images are paths, URLs, encoded bytes, or Hugging Face's structs of bytes and path. Without a column `id`, ids are
    NAME:NUMBER, the file's name and the row's number from 1.
    """

    def __init__(self, prompt: Optional[str], defaults: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self._defaults = defaults

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the rows of a Parquet file."""
        from pyarrow.parquet import ParquetFile

        with opened(join(folder, name)) as file:
            table = ParquetFile(file)
            if "id" not in table.schema_arrow.names:
                for row in range(table.metadata.num_rows):
                    yield Entry(row + 1, row, row + 1, f"{name}:{row + 1}")
                return
            row = 0
            for batch in table.iter_batches(columns=["id"]):
                for value in batch.column(0).to_pylist():
                    yield Entry(row + 1, row, row + 1, _row_id(value))
                    row += 1

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Read the rows in a range of row numbers, from the row groups that overlap it."""
        from pyarrow.parquet import ParquetFile

        with opened(join(folder, name)) as file:
            table = ParquetFile(file)
            columns = [key for key in table.schema_arrow.names if key in ("id", *PLAIN_KEYS)]
            groups, row, stop = list[int](), 0, 0
            for group in range(table.num_row_groups):
                start, stop = stop, stop + table.metadata.row_group(group).num_rows
                if start < entry.stop and stop > entry.start:
                    if not groups:
                        row = start
                    groups.append(group)
            for batch in table.iter_batches(_ROWS_PER_READ, groups, columns):
                for values in batch.to_pylist():
                    row += 1
                    if entry.start < row <= entry.stop:
                        yield row, self._row(name, row, values)

    def _row(self, name: str, number: int, values: dict[str, Any]) -> Row:
        row_id = _row_id(values["id"]) if "id" in values else f"{name}:{number}"
        if row_id is None:
            return Row(
                None, False, UsageError(f"{name}: row {number}: id must be a string or a whole number")
            )
        values["image"] = _image(values.get("image"))
        if isinstance(values.get("images"), list):
            values["images"] = [_image(image) for image in values["images"]]
        return plain_row(row_id, values, self._prompt, self._defaults)


def _row_id(value: Any) -> RowId:
    return value if isinstance(value, str) or type(value) is int else None


def _image(value: Any) -> Any:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return data_url(value) if isinstance(value, bytes) else value
