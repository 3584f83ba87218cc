"""One line to the user, beside what a script prints."""

from __future__ import annotations

import functools
import sys


@functools.cache
def notice(line: str) -> None:
    """Write a line to stderr, where there is one, once: what the script prints stays its own."""
    if sys.stderr is not None:
        sys.stderr.write(f"qwenvl: {line}\n")
