"""Engine settings for tests: the portable graph and the engine program."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

import pytest

from paddlemix_qwenvl_plugin import QwenVL

# "gpu" runs the tests that support it on a GPU (tests/cuda/README.md).
DEVICE = os.environ.get("QWENVL_TEST_DEVICE", "cpu")

HAS_COMPILER = shutil.which("c++") is not None

needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason="the engine needs a C++17 compiler: apt-get install g++"
)

ENGINES = ["portable", pytest.param("fused", marks=needs_compiler)]


def open_model(vision: Path, language: Path, engine: str, model: Optional[Path] = None) -> QwenVL:
    """Open and load a model on the CPU with the engine setting `engine`, for a fixture that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENVL_ENGINE", engine)
        vl = QwenVL.from_exported(vision, language, model)
        vl._loop.load(vision=True)  # now, while QWENVL_ENGINE is set
    return vl
