"""Fixtures: the engine, built once per session, its ISAs, and the golden models.

These tests also run without Paddle: `pytest --confcutdir=tests/csrc tests/csrc`.

To run those of the C interface on a GPU (tests/cuda/README.md names their files), set QWENVL_TEST_LIBRARY to the path
of a libqwenvl.so that has libqwenvl_cuda.so and the kernels beside it. The tests then create every engine on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from build_engine import REPO, build
from engine import DEVICE_LIBRARY, ISAS, Library
from golden_model import GoldenModel


@pytest.fixture(scope="session")
def library() -> Library:
    if DEVICE_LIBRARY:
        return Library(Path(DEVICE_LIBRARY))
    return Library(build(REPO / "build" / "engine") / "libqwenvl_testing.so")


@pytest.fixture(
    scope="session", params=["best"] if DEVICE_LIBRARY else [name for name in ISAS if name != "best"]
)
def isa(request: pytest.FixtureRequest, library: Library) -> int:
    """Number of each ISA but `best`, with a skip for those that this processor lacks; on a GPU only of `best`."""
    isa = ISAS[request.param]
    if DEVICE_LIBRARY:
        return isa
    if not library.has_isa(isa):
        pytest.skip(f"this processor has no {request.param} instructions")
    return isa


@pytest.fixture(scope="session")
def golden_model() -> Callable[[str], GoldenModel]:
    """Function that loads the golden model of a name, once per session."""
    return functools.lru_cache(GoldenModel)
