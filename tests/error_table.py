"""The tables of docs/errors.md: one row per case, with its error message.

After a message is reworded in the code, this command rewrites the rows that differ:

    QWENVL_TEST_UPDATE_ERRORS=1 pytest tests/errors tests/serve/test_serve_errors.py

Then restore `…` for variable text, such as a library's own message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
_UPDATE = os.environ.get("QWENVL_TEST_UPDATE_ERRORS") == "1"


def cells_of(line: str) -> list[str]:
    r"""Split a line of a table into its cells, at each | that is not escaped as \|."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table_rows() -> Iterator[list[str]]:
    """Yield the cells of each line of the document, in order; a line with fewer than two | has none."""
    return map(cells_of, DOCUMENT.read_text("utf-8").splitlines())


def matches(pattern: str, text: str) -> bool:
    """Whether a text matches the message of a row; `…` in the row matches any text that is not empty."""
    return re.fullmatch(".+".join(map(re.escape, pattern.split("…"))), text) is not None


def check(what: str, pattern: str, text: str) -> None:
    """Compare the message `text` with `pattern`, from the row of the case `what`; in update mode, rewrite the row."""
    if _UPDATE and not matches(pattern, text):
        document = DOCUMENT.read_text("utf-8")
        reworded = [_reworded(line, what, pattern, text) for line in document.split("\n")]
        assert reworded != document.split("\n"), f"no row of {what!r} has the message {pattern!r}"
        DOCUMENT.write_text("\n".join(reworded), "utf-8")
    else:
        assert matches(pattern, text), text


def _reworded(line: str, what: str, pattern: str, text: str) -> str:
    if not line.startswith("|") or cells_of(line)[:1] != [what]:
        return line
    old, new = (f"`{message}`".replace("|", r"\|") for message in (pattern, text))
    return line.replace(old, new)
