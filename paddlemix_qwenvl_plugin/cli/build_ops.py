"""`qwenvl build-ops`."""

from __future__ import annotations


def build_ops() -> None:
    """Build the engine's operators for the installed Paddle now, rather than when they are first used."""
    from paddlemix_qwenvl_plugin.engine.build import library

    print(library(allowed=True))
