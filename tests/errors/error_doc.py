"""Rows of docs/errors.md: input, error line, exit code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


@dataclass(frozen=True)
class Row:
    """`line` is what follows `qwenvl: `; `…` in it stands for any text."""

    what: str
    line: str
    code: int

    def matches(self, line: str) -> bool:
        pattern = ".+".join(re.escape(part) for part in self.line.split("…"))
        return re.fullmatch(pattern, line) is not None


def rows() -> list[Row]:
    """Every table row that ends in a number, in the document's order."""
    found = []
    for line in DOCUMENT.read_text("utf-8").splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and cells[2].isdigit():
            found.append(Row(cells[0], cells[1].strip("`"), int(cells[2])))
    return found
