"""Optional libraries of the extra `eval`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from paddlemix_qwenvl_plugin.util.errors import QwenVLError


def extra(module: str, what: str) -> Any:
    """Import a module that the feature `what` needs.

    Raises:
        QwenVLError: its library is not installed; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = (error.name or module).partition(".")[0]
        raise QwenVLError(
            f"{what} needs the library {library}: pip install 'paddlemix-qwenvl-plugin[eval]'"
        ) from error
