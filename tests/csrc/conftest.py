"""Fixtures: the engine, built once per session. Without Paddle: pytest --confcutdir=tests/csrc tests/csrc.

On a GPU: QWENVL_TEST_LIBRARY names a libqwenvl.so with libqwenvl_cuda.so and the kernels beside it
(tests/cuda/README.md), and the tests create every engine on that GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_engine import REPO, build
from engine import DEVICE_LIBRARY, ISAS, Library, pointer
from golden_model import GoldenModel


@pytest.fixture(scope="session")
def library() -> Library:
    if DEVICE_LIBRARY:
        return Library(Path(DEVICE_LIBRARY))
    return Library(build(REPO / "build" / "engine") / "libqwenvl_testing.so")


@pytest.fixture(scope="session", params=["best"] if DEVICE_LIBRARY else [n for n in ISAS if n != "best"])
def isa(request: pytest.FixtureRequest, library: Library) -> int:
    """Each ISA that this processor supports."""
    value = ISAS[request.param]
    if DEVICE_LIBRARY:
        return value
    nothing = np.zeros(1, np.float32)
    if library.dll.qvlt_gelu(value, 1, pointer(nothing)):
        pytest.skip(f"this processor has no {request.param} instructions")
    return value


@pytest.fixture(scope="session")
def golden_model() -> Callable[[str], GoldenModel]:
    return functools.lru_cache(GoldenModel)
