"""Build csrc for the tests of this folder, into build/ of the checkout, which later test runs reuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from paddlemix_qwenvl_plugin.engine.sources import all_isas

REPO = Path(__file__).resolve().parents[2]


def build(folder: Path, *options: str, target: str = "all") -> Path:
    """Configure and build csrc into a folder and return the folder.

    Skip the test if build tools are missing, fail it if the build fails. Only the generic kernels and those for the
    ISAs of this processor are compiled: all of them would take minutes.
    """
    if not shutil.which("cmake") or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("the engine needs cmake and a C++17 compiler: apt-get install cmake g++")
    isas = [isa.name for isa in all_isas(REPO / "csrc") if isa.name == "generic" or isa.runs_here()]
    options = (f"-DQVL_ONLY_ISAS={';'.join(isas)}", *options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # test processes may run in parallel
        for command in (
            ["cmake", "-S", str(REPO / "csrc"), "-B", str(folder), *options],
            ["cmake", "--build", str(folder), "--parallel", "2", "--target", target],
        ):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                output = f"{' '.join(command)}\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
                pytest.fail(output, pytrace=False)
    return folder
