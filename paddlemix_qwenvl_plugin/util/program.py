"""The name under which a user runs this package's command."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """`qwenvl` as a user types it here, for the commands that messages name: as this process was started.

    "qwenvl" where that finds this one, and where something else was started.
    """
    started = sys.argv[0] if sys.argv else ""
    path = Path(started)
    if path.stem != "qwenvl" or started == path.name:
        return "qwenvl"
    found = shutil.which("qwenvl")
    if found is not None and path.exists() and path.samefile(found):
        return "qwenvl"
    return shlex.quote(started)
