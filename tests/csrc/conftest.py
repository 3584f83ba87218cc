"""The engine is built once a session, into build/ of the checkout, where the next session finds it again."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from engine import ISAS, Library, pointer  # noqa: E402
from golden_model import GoldenModel  # noqa: E402

REPO = Path(__file__).resolve().parents[2]


def build(folder: Path, *options: str) -> Path:
    """Configure and build csrc into a folder; skips the test where there is nothing to build with."""
    if not shutil.which("cmake") or not (shutil.which("c++") or os.environ.get("CXX")):
        pytest.skip("the engine needs cmake and a C++17 compiler: apt-get install cmake g++")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(REPO / "csrc"), "-B", str(folder), *generator, *options],
        ["cmake", "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)
    return folder


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(build(REPO / "build" / "engine") / "libqwenvl_testing.so")


@pytest.fixture(scope="session", params=[name for name in ISAS if name != "best"])
def isa(request: pytest.FixtureRequest, library: Library) -> int:
    """Each instruction set that this processor has."""
    value = ISAS[request.param]
    nothing = np.zeros(1, np.float32)
    if library.dll.qvlt_gelu(value, 1, pointer(nothing)):
        pytest.skip(f"this processor has no {request.param} instructions")
    return value


@pytest.fixture(scope="session")
def golden_model() -> Callable[[str], GoldenModel]:
    return functools.lru_cache(GoldenModel)
