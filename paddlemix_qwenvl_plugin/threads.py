"""How many CPU threads to use. Imported with the package, since Paddle sets OMP_NUM_THREADS=1 when it is imported."""

from __future__ import annotations

import os
import sys

_ASKED = os.environ.get("OMP_NUM_THREADS", "") if "paddle" not in sys.modules else ""


def cpu_threads() -> int:
    """OMP_NUM_THREADS if it was set before Paddle was imported, else the CPUs this process may run on."""
    if _ASKED.isdigit() and int(_ASKED) > 0:
        return int(_ASKED)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
