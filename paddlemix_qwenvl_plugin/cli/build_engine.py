"""`qwenvl build-engine`."""

from __future__ import annotations

from importlib.util import find_spec

from paddlemix_qwenvl_plugin.cli import options as flags
from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle


def build_engine(device: flags.Device = "cpu") -> None:
    """Build the engine ahead of its first use, and its operators for the installed Paddle."""
    from paddlemix_qwenvl_plugin.engine.build import library, operators_library
    from paddlemix_qwenvl_plugin.engine.gpu import build_for, gpu_index

    index = gpu_index(device)
    # allowed: build even with QWENVL_NO_BUILD or after a failed build.
    print(library(allowed=True))
    if index is not None:
        print(*build_for(index, allowed=True), sep="\n")
    if find_spec("paddle") is not None:
        require_paddle()
        print(operators_library(allowed=True))
