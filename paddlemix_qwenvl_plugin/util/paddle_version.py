"""Which Paddle is installed, asked before anything imports it."""

from __future__ import annotations

from importlib import metadata, util

from packaging.version import Version

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

MINIMUM = "3.0"


def require_paddle() -> None:
    """Raise QwenVLError, with what mends it, unless a Paddle new enough is installed.

    Builds for other devices carry other distribution names; their version is not checked.
    """
    if util.find_spec("paddle") is None:
        raise QwenVLError(
            "Paddle is not installed; run: pip install 'paddlemix-qwenvl-plugin[cpu]' (or [gpu])"
        )
    for distribution in ("paddlepaddle", "paddlepaddle-gpu"):
        try:
            found = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if Version(found) < Version(MINIMUM):
            raise QwenVLError(f"{distribution} {found} is too old; install {MINIMUM} or newer")
