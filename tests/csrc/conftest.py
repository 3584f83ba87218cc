"""The engine, built once a session. Without Paddle: pytest --confcutdir=tests/csrc tests/csrc."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from build_engine import REPO, build
from engine import ISAS, Library, pointer
from golden_model import GoldenModel


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
