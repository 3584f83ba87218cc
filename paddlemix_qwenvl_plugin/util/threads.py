"""How many CPU threads to use.

Paddle sets OMP_NUM_THREADS=1 when it is imported, so the variable is read before: at the interpreter's start by the
activation, else when this package is imported.
"""

from __future__ import annotations

import os
import sys


def _asked() -> str:
    activation = sys.modules.get("_qwenvl_activate")
    if activation is not None:
        return str(activation.omp_num_threads)
    return os.environ.get("OMP_NUM_THREADS", "") if "paddle" not in sys.modules else ""


_ASKED = _asked()


def cpu_threads() -> int:
    """OMP_NUM_THREADS as the user set it, else the CPUs that this process may run on."""
    if _ASKED.isdigit() and int(_ASKED) > 0:
        return int(_ASKED)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
