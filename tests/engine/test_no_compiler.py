"""The tools that compile the engine, without a compiler: tools/gpu_bundle.py and tools/release_wheel.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["gpu_bundle", "release_wheel"])
def test_no_compiler(tmp_path: Path, tool: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tools.{tool}", tmp_path / "output"],
        cwd=REPO,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = (
        "error: the engine needs a C++17 compiler, and no-such-compiler was not found: apt-get install g++\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
