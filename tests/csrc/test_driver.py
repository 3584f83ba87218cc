"""A C program on the library (driver/driver.c), plain and under the sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from build_engine import REPO, build
from engine import Library


def run(folder: Path, *arguments: str) -> str:
    # By default a sanitizer's allocator aborts where others return NULL, the case under test.
    options = {f"{name}_OPTIONS": "allocator_may_return_null=1" for name in ("ASAN", "TSAN")}
    done = subprocess.run(
        [str(folder / "driver"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **options, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def plain(library: Library) -> Path:
    return library.path.parent


def sanitized(kind: str) -> Path:
    name = kind.split(",")[0]
    return build(REPO / "build" / f"engine-{name}", f"-DQVL_SANITIZE={kind}", target="driver")


@pytest.fixture(scope="module")
def address() -> Path:
    return sanitized("address,undefined")


@pytest.fixture(scope="module")
def thread() -> Path:
    return sanitized("thread")


def test_many_requests_leave_memory_flat(plain):
    assert run(plain, "soak", "10000").startswith("10000 requests")


def test_threads_that_cannot_be_started(plain):
    assert "cannot start" in run(plain, "limits")


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_corrupted_arguments(plain, seed):
    assert "of 20000 calls refused" in run(plain, "fuzz", "20000", seed)


def test_address_and_undefined_behaviour(address):
    assert int(run(address, "all").split()[0]) >= 5
    assert "answered" in run(address, "threads")
    assert re.match(r"\d+ of 2000 calls refused", run(address, "fuzz", "2000", "4"))


def test_data_races(thread):
    assert "4 threads on 2 engines answered" in run(thread, "threads")
