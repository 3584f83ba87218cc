"""Change upstream's and Paddle's objects: all together or not at all, each once, and so that it can be undone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from paddlemix_qwenvl_plugin.util import env

_ABSENT = object()


class Patch:
    """Attributes set so far, with what they were."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, where `owner` is a module, a class or an instance; a new name is allowed."""
        # Not getattr: it binds methods and shows what is inherited, and neither can be put back as it was.
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)
        if env.PLUGIN_DEBUG.read() and sys.stderr is not None:
            of = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", type(owner).__qualname__)
            sys.stderr.write(f"qwenvl: {self._who} set {name} of {of}\n")

    def roll_back(self) -> None:
        """Put everything back, the last change first."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


@contextlib.contextmanager
def patching(module: ModuleType) -> Iterator[Patch]:
    """For the hook of `module`: what `Patch.set` changes in the block is undone if the block raises."""
    patch = Patch(f"hook {module.__name__}")
    try:
        yield patch
    except BaseException:
        patch.roll_back()
        raise


_process_wide = Patch("plugin")
_replaced: set[tuple[int, str]] = set()


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Set `owner.name` to `make(what it is)` for the whole process; a second call for the same name does nothing."""
    if (id(owner), name) not in _replaced:
        _process_wide.set(owner, name, make(getattr(owner, name)))
        _replaced.add((id(owner), name))


def put_back() -> None:
    """Undo every `replace`."""
    _process_wide.roll_back()
    _replaced.clear()
