"""Interface of input formats: index the rows of a file, and read a range of rows."""

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
    "image",
    "images",
    "prompt",
    "chat",
    "system",
    "adapter",
    *(field.name for field in fields(GenerationOptions)),
)
"""Keys of the plain form (this package's format of a row) without the id: the fields of Parquet and WebDataset rows."""


class Entry(NamedTuple):
    """Location of a row, or of consecutive rows, in an input file.

    Attributes:
        number: number of the first row in the file, from 1; in JSONL, of its line.
        start, stop: the range [start, stop), in the unit of the format: bytes, or rows from 0.
        row_id: id of the row; None without a valid id, and for several rows.
    """

    number: int
    start: int
    stop: int
    row_id: RowId = None


class Format(Protocol):
    """Interface of an input format. `name`: a file of the folder or URL `folder`.

    Constructors take `defaults` and, except for JSONL, `prompt`; see plain_row().
    """

    def index(self, folder: str, name: str) -> Iterator[Entry]:
        """List the rows of a file, each as an entry."""

    def rows(self, folder: str, name: str, entry: Entry) -> Iterator[tuple[int, Row]]:
        """Read the rows of an entry, of which there may be several, lazily, as (number, row)."""


def plain_row(
    row_id: RowId, values: Mapping[str, Any], prompt: Optional[str], defaults: Mapping[str, Any]
) -> Row:
    """Build a row from fields of the plain form, or one with an error; other fields are ignored.

    Args:
        row_id: id of the row.
        values: the fields.
        prompt: prompt for a row without one.
        defaults: values of the generation options that the row does not set.
    """
    # In the rows below, False: not in OpenAI's format.
    plain_values = {key: values[key] for key in PLAIN_KEYS if values.get(key) is not None}
    if prompt is not None:
        plain_values.setdefault("prompt", prompt)
    try:
        return Row(row_id, False, plain_form.read(plain_values, defaults))
    except UsageError as error:
        return Row(row_id, False, error)


def data_url(encoded: bytes) -> str:
    """Build the `data:` URL of an encoded image."""
    return "data:;base64," + base64.b64encode(encoded).decode()
