"""Rows of the tables in docs/errors.md."""

from __future__ import annotations

from dataclasses import dataclass

from error_table import table_rows


@dataclass(frozen=True)
class Row:
    """A row: a description of the input, the message after `qwenvl: `, the exit code.

    `…` in a message matches any text that is not empty. With the exit code 0 there is no error line, and `message` is
    not compared.
    """

    description: str
    message: str
    exit_code: int


def rows() -> list[Row]:
    """All rows whose third and last cell is an exit code, in the document's order."""
    return [
        Row(cells[0], cells[1].strip("`"), int(cells[2]))
        for cells in table_rows()
        if len(cells) == 3 and cells[2].isdigit()
    ]
