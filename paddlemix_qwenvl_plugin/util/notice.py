"""Notices to the user on stderr."""

from __future__ import annotations

import functools
import sys


@functools.cache
def notice(line: str) -> None:
    """Write a line to stderr, each line once per process, if stderr exists; stdout belongs to the user's script."""
    if sys.stderr is not None:
        sys.stderr.write(f"qwenvl: {line}\n")
