"""Drivers that csrc/cuda/driver.cc refuses: stubs of libcuda.so.1 in a few lines of C."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from engines import needs_compiler

pytestmark = needs_compiler

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Prints the message of the error with which the driver is refused.
PROGRAM = """
#include <cstdio>
#include "core/error.h"
#include "cuda/driver.h"
int main() {
  qvl_error error;
  qvl::guarded(&error, [] { qvl::cuda::driver(); });
  std::puts(error.message);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "main.cc").write_text(PROGRAM)
    sources = [folder / "main.cc", CSRC / "cuda" / "driver.cc"]
    flags = ["-std=c++17", f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", folder / "main", "-ldl"]
    subprocess.run(["c++", *sources, *flags], check=True)
    return folder / "main"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the NVIDIA driver has no cuDriverGetVersion"),
        (
            "int cuDriverGetVersion(int* version) { return 3; }",
            "the NVIDIA driver does not report its CUDA version: error 3",
        ),
        (
            "int cuDriverGetVersion(int* version) { *version = 11080; return 0; }",
            "the NVIDIA driver supports only CUDA 11.8; install one for CUDA 12 or newer (525 or newer)",
        ),
        (
            "int cuDriverGetVersion(int* version) { *version = 12040; return 0; }",
            "the NVIDIA driver has no cuInit",
        ),
    ],
    ids=["without a version", "failing query", "too old", "incomplete"],
)
def test_refused_drivers(program: Path, tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "driver.c").write_text(source)
    library = ["-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(["cc", tmp_path / "driver.c", *library], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    assert subprocess.check_output([program], env=environment, text=True) == f"{message}\n"
