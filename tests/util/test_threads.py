"""Number of CPU threads: OMP_NUM_THREADS as it was before Paddle changed it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """\
import {first}; import {second}
from paddlemix_qwenvl_plugin.util.threads import cpu_threads
print(cpu_threads())
"""


@pytest.mark.parametrize(
    "order", [("paddlemix_qwenvl_plugin", "paddle"), ("paddle", "paddlemix_qwenvl_plugin")]
)
@pytest.mark.parametrize("asked", ["", "3"])
def test_cpu_threads(order, asked):
    env = {**os.environ, "OMP_NUM_THREADS": asked}
    if not asked:
        del env["OMP_NUM_THREADS"]
    code = CODE.format(first=order[0], second=order[1])
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    counted = len(os.sched_getaffinity(0))
    # After Paddle is imported, only the activation at the interpreter's start knows the user's value.
    known = order[0] != "paddle" or importlib.util.find_spec("_qwenvl_activate") is not None
    expected = 3 if asked and known else counted
    assert int(output.stdout) == expected
