"""Reversible monkey patches of upstream's and Paddle's objects.

`patching` makes all changes of a hook or none; `replace` makes a change once per process.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from paddlemix_qwenvl_plugin.util import env

_ABSENT = object()


class Patch:
    """Attributes that were set, with their previous values. `source` names the code that sets them, for debugging."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set attribute `name` of a module, a class or an instance; it may be new."""
        # Not getattr: it binds methods and finds inherited attributes, which cannot be restored.
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)
        if env.PLUGIN_DEBUG.read() and sys.stderr is not None:
            owner_name = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None)
            owner_name = owner_name or type(owner).__qualname__
            sys.stderr.write(f"qwenvl: {self._source} set {name} of {owner_name}\n")

    def roll_back(self) -> None:
        """Undo all changes, the last one first."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


@contextlib.contextmanager
def patching(module: ModuleType) -> Iterator[Patch]:
    """Give a hook of `module` a Patch for the block; roll back its changes if the block raises."""
    patch = Patch(f"hook {module.__name__}")
    try:
        yield patch
    except BaseException:
        patch.roll_back()
        raise


_process_wide = Patch("plugin")
_replaced: set[tuple[int, str]] = set()


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set `owner.name` to `make(current value)` process-wide; a second call for the same attribute has no effect."""
    if (id(owner), name) not in _replaced:
        _process_wide.set(owner, name, make(getattr(owner, name)))
        _replaced.add((id(owner), name))


def undo_all() -> None:
    """Undo every `replace`, for tests."""
    _process_wide.roll_back()
    _replaced.clear()
