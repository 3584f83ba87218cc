"""Tracebacks for `qwenvl --debug`."""

from __future__ import annotations

import traceback

from paddlemix_qwenvl_plugin.util import env


def print_traceback_if_debugging() -> None:
    """Print the traceback of the current exception if QWENVL_DEBUG is on; `qwenvl --debug` turns it on."""
    if env.DEBUG.read():
        traceback.print_exc()
