"""Number of CPU threads to use.

Paddle sets OMP_NUM_THREADS=1 when it is imported, so the variable is read earlier: at the start of the interpreter by
the activation, else when this package is imported. Without the activation it is ignored if Paddle is imported already.
"""

from __future__ import annotations

import math
import os
import sys

from paddlemix_qwenvl_plugin.util.control_groups import cpu_quota


def _omp_num_threads() -> str:
    activation = sys.modules.get("_qwenvl_activate")
    if activation is not None:
        return str(activation.omp_num_threads)
    return os.environ.get("OMP_NUM_THREADS", "") if "paddle" not in sys.modules else ""


_OMP_NUM_THREADS = _omp_num_threads()


def limit(n_threads: int) -> None:
    """Set the result of `cpu_threads` in this process, unless the user or an earlier call has set it.

    For actors of a cluster: their share of a machine is known only after this package is imported.
    """
    global _OMP_NUM_THREADS
    _OMP_NUM_THREADS = _OMP_NUM_THREADS or str(n_threads)


def cpu_threads() -> int:
    """Number of threads: OMP_NUM_THREADS as set by the user, else that of `limit`, else the CPUs of this process.

    These are the CPUs of its affinity, or the CPU quota of its container, rounded up, if that is lower. They are also
    used if the user's OMP_NUM_THREADS is not a positive integer; `limit` then has no effect.
    """
    if _OMP_NUM_THREADS.isdigit() and int(_OMP_NUM_THREADS) > 0:
        return int(_OMP_NUM_THREADS)
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return n_cpus if quota is None else min(n_cpus, math.ceil(quota))
