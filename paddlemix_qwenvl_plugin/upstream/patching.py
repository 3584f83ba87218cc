"""Change upstream's objects all together or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_ABSENT = object()


class Patch:
    """Attributes set so far, with what they were."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, where `owner` is a module, a class or an instance; a new name is allowed."""
        # Not getattr: it binds methods and shows what is inherited, and neither can be put back as it was.
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)
        if os.environ.get("QWENVL_PLUGIN_DEBUG") == "1" and sys.stderr is not None:
            of = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", type(owner).__qualname__)
            sys.stderr.write(f"qwenvl: hook {self._module.__name__} set {name} of {of}\n")

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
    patch = Patch(module)
    try:
        yield patch
    except BaseException:
        patch.roll_back()
        raise
