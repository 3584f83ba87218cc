"""The tool that builds the bundle for GPU tests: its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_no_compiler(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_bundle", tmp_path / "bundle"],
        cwd=REPO,
        env={**os.environ, "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = (
        "error: the engine needs a C++17 compiler, and no-such-compiler was not found: apt-get install g++\n"
    )
    assert (done.returncode, done.stderr) == (1, line)
