"""Number of CPU threads: the user's OMP_NUM_THREADS, which Paddle overwrites, or the CPUs that the process may use."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest

from paddlemix_qwenvl_plugin.util import threads
from paddlemix_qwenvl_plugin.util.control_groups import cpu_quota

CODE = """\
import {first}; import {second}
from paddlemix_qwenvl_plugin.util.threads import cpu_threads
print(cpu_threads())
"""


@pytest.mark.parametrize(
    "order", [("paddlemix_qwenvl_plugin", "paddle"), ("paddle", "paddlemix_qwenvl_plugin")]
)
@pytest.mark.parametrize("n_threads", [None, 3])
def test_cpu_threads(order, n_threads):
    env = {**os.environ, "OMP_NUM_THREADS": str(n_threads)}
    if n_threads is None:
        del env["OMP_NUM_THREADS"]
    code = CODE.format(first=order[0], second=order[1])
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    # If Paddle is imported first, only the activation at the interpreter's start can have saved the user's value.
    is_saved = order[0] != "paddle" or importlib.util.find_spec("_qwenvl_activate") is not None
    n_cpus = min(len(os.sched_getaffinity(0)), math.ceil(cpu_quota() or sys.maxsize))
    assert int(output.stdout) == (n_threads if n_threads is not None and is_saved else n_cpus)


@pytest.mark.parametrize(("quota", "n_threads"), [(None, 8), (2.5, 3), (0.2, 1), (64.0, 8)])
def test_the_quota_of_a_container(monkeypatch, quota, n_threads):
    monkeypatch.setattr(threads, "_OMP_NUM_THREADS", "")
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads.cpu_threads() == n_threads
