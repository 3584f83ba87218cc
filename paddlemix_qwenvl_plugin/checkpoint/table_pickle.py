"""A restricted unpickler for tables of tensors: a pickle can run any code, so only listed names resolve."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

# Exceptions raised while reading a damaged pickle.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, KeyError, ValueError, TypeError),
    *(AttributeError, IndexError, NotImplementedError, OverflowError, MemoryError, RecursionError),
)


class RefusedError(Exception):
    """A pickle uses a feature that no table of tensors needs."""


# The implementation in Python: the one in C allocates gigabytes on request of a few bytes.
class TableUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Unpickler for any protocol that resolves only the names in `known`.

    Args:
        file: the pickle, open for reading bytes.
        known: (module, name) -> replacement object. Any other name raises RefusedError.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file, encoding="latin1")  # as Paddle does
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name from `known`; raise RefusedError for any other."""
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedError(f"its pickle imports {module}.{name}") from None

    def _build(self: Any) -> None:
        if callable(self.stack[-2]):  # would modify a class or a function that other pickles use
            raise RefusedError("its pickle changes what it is made with")
        self.load_build()

    dispatch[pickle.BUILD[0]] = _build
