"""Number of CPU threads to use.

Paddle sets OMP_NUM_THREADS=1 when it is imported, so the variable is read earlier: at the start of the interpreter by
the activation, else when this package is imported. Without the activation it is ignored if Paddle is imported already.
"""

from __future__ import annotations

import os
import sys


def _omp_num_threads() -> str:
    activation = sys.modules.get("_qwenvl_activate")
    if activation is not None:
        return str(activation.omp_num_threads)
    return os.environ.get("OMP_NUM_THREADS", "") if "paddle" not in sys.modules else ""


_OMP_NUM_THREADS = _omp_num_threads()


def limit(n_threads: int) -> None:
    """Set the result of `cpu_threads` in this process, unless the user has set OMP_NUM_THREADS.

    For actors of a cluster: their share of a machine is known only after this package is imported.
    """
    global _OMP_NUM_THREADS
    _OMP_NUM_THREADS = _OMP_NUM_THREADS or str(n_threads)


def cpu_threads() -> int:
    """Number of threads: OMP_NUM_THREADS as set by the user, else that of `limit`, else the CPUs of this process."""
    if _OMP_NUM_THREADS.isdigit() and int(_OMP_NUM_THREADS) > 0:
        return int(_OMP_NUM_THREADS)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
