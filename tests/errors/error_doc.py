"""Rows of docs/errors.md: input, error line, exit code."""

from __future__ import annotations

from dataclasses import dataclass

from error_table import table_rows


@dataclass(frozen=True)
class Row:
    """Row of a table; `line` is the message after `qwenvl: `, in which `…` matches any text."""

    what: str
    line: str
    code: int


def rows() -> list[Row]:
    """Every table row that ends in a number, in the document's order."""
    return [
        Row(cells[0], cells[1].strip("`"), int(cells[2]))
        for cells in table_rows()
        if len(cells) == 3 and cells[2].isdigit()
    ]
