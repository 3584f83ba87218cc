"""The C program driver/driver.c, which calls the library: built without and with sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from build_engine import REPO, build
from engine import DTYPES, ISAS, Library


def run(folder: Path, *arguments: str) -> str:
    """Run the driver of a build folder and return its output."""
    # Some tests allocate too much memory: the library must handle NULL. By default the sanitizers abort instead.
    options = {f"{name}_OPTIONS": "allocator_may_return_null=1" for name in ("ASAN", "TSAN")}
    # OMP_NUM_THREADS is for engines whose n_threads the fuzzer sets to 0; the driver sets that of all others.
    result = subprocess.run(
        [str(folder / "driver"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **options, "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def plain(library: Library) -> Path:
    return library.path.parent


def build_sanitized(sanitizers: str) -> Path:
    name = sanitizers.split(",")[0]
    return build(REPO / "build" / f"engine-{name}", f"-DQVL_SANITIZE={sanitizers}", target="driver")


@pytest.fixture(scope="module")
def address_sanitizer() -> Path:
    return build_sanitized("address,undefined")


@pytest.fixture(scope="module")
def thread_sanitizer() -> Path:
    return build_sanitized("thread")


def test_memory_does_not_grow_with_requests(plain):
    assert run(plain, "soak", "10000").startswith("10000 requests")


def test_threads_that_cannot_be_started(plain):
    assert "cannot start" in run(plain, "limits")


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_corrupted_arguments(plain, seed):
    assert "of 20000 calls refused" in run(plain, "fuzz", "20000", seed)


def test_address_and_undefined_behaviour(library, address_sanitizer):
    n_isas = sum(library.has_isa(isa) for name, isa in ISAS.items() if name != "best")
    assert run(address_sanitizer, "all") == f"{len(DTYPES) * n_isas} engines answered\n"
    assert "answered" in run(address_sanitizer, "threads")
    assert re.match(r"\d+ of 2000 calls refused", run(address_sanitizer, "fuzz", "2000", "4"))


def test_data_races(thread_sanitizer):
    assert "4 threads on 2 engines answered" in run(thread_sanitizer, "threads")
