"""`qwenvl build-engine`."""

from __future__ import annotations

from importlib.util import find_spec

from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle


def build_engine() -> None:
    """Build the engine now, rather than when it is first used, and its operators for the installed Paddle."""
    from paddlemix_qwenvl_plugin.engine.build import library, operators_library

    print(library(allowed=True))
    if find_spec("paddle") is not None:
        require_paddle()
        print(operators_library(allowed=True))
