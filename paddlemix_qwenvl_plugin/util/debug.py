"""Tracebacks, for those who ask."""

from __future__ import annotations

import traceback

from paddlemix_qwenvl_plugin.util import env


def print_traceback_if_debugging() -> None:
    """Print the traceback of the error that is being handled, with `qwenvl --debug`."""
    if env.DEBUG.read():
        traceback.print_exc()
