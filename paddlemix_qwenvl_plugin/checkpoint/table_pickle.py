"""An unpickler for tables of tensors: a pickle can run any code, so this one may name nothing but what it is given."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

# What reading a damaged pickle raises.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, KeyError, ValueError, TypeError),
    *(AttributeError, IndexError, NotImplementedError, OverflowError, MemoryError, RecursionError),
)


class RefusedError(Exception):
    """A pickle asks for something that no table of tensors has in it."""


# The one written in Python: the other one takes gigabytes of memory when a few bytes ask it to.
class TableUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Reads a pickle of any protocol.

    Args:
        file: the pickle, open for reading bytes.
        known: (module, name) -> what the pickle gets for it. Anything else is refused with RefusedError.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file, encoding="latin1")  # as Paddle does
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """What `known` has for a name."""
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedError(f"its pickle asks for {module}.{name}") from None

    def _build(self: Any) -> None:
        if callable(self.stack[-2]):  # it would change a class or a function for whoever uses it next
            raise RefusedError("its pickle changes what it is made with")
        self.load_build()

    dispatch[pickle.BUILD[0]] = _build
