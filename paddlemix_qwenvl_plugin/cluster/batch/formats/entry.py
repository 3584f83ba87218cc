"""Interface of an input format: an index of a file's rows, and the rows in a range of it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, Optional, Protocol

from paddlemix_qwenvl_plugin.batch import plain_form
from paddlemix_qwenvl_plugin.batch.request import RowId
from paddlemix_qwenvl_plugin.batch.rows import Row
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

PLAIN_KEYS = (
    *("image", "images", "prompt", "chat", "system", "adapter"),
    *(field.name for field in fields(GenerationOptions)),
)
"""Keys of the plain form besides the id: the fields that Parquet and WebDataset rows may have."""


class Entry(NamedTuple):
    """Place of a row in its file, or of consecutive rows.

    Attributes:
        number: number of the row in the file, from 1; in JSONL, of its line.
        start, stop: the range, in the format's own unit: bytes, or rows.
        row_id: its id; None if the row has no valid one.
    """

    number: int
    start: int
    stop: int
    row_id: RowId = None


class Format(Protocol):
    """An input format. `defaults` of a format are the generation options of rows that do not set them."""

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the rows of a file."""

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Read the rows in a range as (number, row), as they are needed."""


def plain_row(
    row_id: RowId, values: Mapping[str, Any], prompt: Optional[str], defaults: Mapping[str, Any]
) -> Row:
    """Build a row from fields of the plain form; fields that the form does not have are ignored.

    Args:
        row_id: its id.
        values: the fields.
        prompt: prompt of a row without one.
        defaults: generation options for those that the row does not set.
    """
    known = {key: values[key] for key in PLAIN_KEYS if values.get(key) is not None}
    if prompt is not None:
        known.setdefault("prompt", prompt)
    try:
        return Row(row_id, False, plain_form.read(known, defaults))
    except UsageError as error:
        return Row(row_id, False, error)


def data_url(encoded: bytes) -> str:
    """Build the `data:` URL of an encoded image."""
    return "data:;base64," + base64.b64encode(encoded).decode()
