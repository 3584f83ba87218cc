"""The name of this package's command, as the user typed it."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """The `qwenvl` command as this process was started, for use in messages.

    "qwenvl" if PATH resolves it to the running command, or if another program was started; else its quoted path.
    """
    command = sys.argv[0] if sys.argv else ""
    path = Path(command)
    if path.stem != "qwenvl" or command == path.name:
        return "qwenvl"
    on_path = shutil.which("qwenvl")
    if on_path is not None and path.exists() and path.samefile(on_path):
        return "qwenvl"
    return shlex.quote(command)
