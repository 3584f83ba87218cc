"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin.errors import naming


def write_beside(target: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file beside `target`, of the same suffix, and rename it to `target` when it is whole.

    Raises:
        OSError: it cannot be written; the error names a file.
    """
    partial = target.with_name(f".partial-{target.name}")
    try:
        with naming(target):
            write(partial)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
