"""Checked import of Paddle: minimum version, clear errors, no messages for Paddle's developers."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib import import_module, metadata, util

from packaging.version import Version

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line
from paddlemix_qwenvl_plugin.util.memory import require_addresses
from paddlemix_qwenvl_plugin.util.program import program

MINIMUM = "3.0"

_NEEDED_MIB = 2048  # address space that Paddle's import takes


def require_paddle() -> None:
    """Import Paddle and check its version.

    The import is slow: call this where Paddle is used, not at the top of a module. The versions of builds for devices
    other than CPUs and NVIDIA GPUs, which have other distribution names, are not checked.

    Raises:
        QwenVLError: Paddle is missing, too old or broken, or a limit (`ulimit -v`) leaves too little address space for
            its import.
    """
    if util.find_spec("paddle") is None:
        raise QwenVLError(
            "Paddle is not installed; run: pip install 'paddlemix-qwenvl-plugin[cpu]' (or [gpu])"
        )
    for distribution in ("paddlepaddle", "paddlepaddle-gpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if Version(version) < Version(MINIMUM):
            raise QwenVLError(f"{distribution} {version} is too old; install {MINIMUM} or newer")
    if "paddle" not in sys.modules:
        require_addresses("Paddle", _NEEDED_MIB)
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        # Paddle warns that ccache is missing, and explains failures at length.
        with contextlib.redirect_stderr(io.StringIO()):
            import_module("paddle")
    except Exception as error:
        raise QwenVLError(
            f"Paddle cannot be imported ({type(error).__name__}: {first_line(error)}); see {program()} doctor"
        ) from error
