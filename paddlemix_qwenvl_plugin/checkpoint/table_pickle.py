"""A restricted unpickler for dicts of tensors: a pickle can run code, so only listed names and opcodes are allowed.

Paddle's pickles contain the values of the tensors, most of which are not read: a string (bytes or text) of more than
1024 bytes becomes a `Span`, its location in the file. PyTorch's pickles refer to values outside of them: the subclass
in torch_table.py resolves these references (BINPERSID) and the classes of storages.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar, NamedTuple

# Exceptions raised while reading a damaged pickle.
DAMAGED = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, KeyError, ValueError, TypeError),
    *(AttributeError, IndexError, NotImplementedError, OverflowError, MemoryError, RecursionError),
)
MAX_DIMS = 8

# Limit on executed opcodes; the 7B model's table needs 30,000.
_MAX_OPCODES = 300_000
# A longer string becomes a Span. Names are shorter; the values of norms and biases are mostly longer.
_MAX_STRING_BYTES = 1024
# Opcodes executed as in Python's unpickler. TableUnpickler implements a few others itself; the rest is refused.
_OPCODES = (
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "POP", "POP_MARK"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "SHORT_BINUNICODE"),
    *("SHORT_BINBYTES", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BINPERSID"),
)


class RefusedError(Exception):
    """Error for a pickle with a feature that no table of tensors needs."""


class Span(NamedTuple):
    """Location of a string in the file: `n_bytes` bytes from `offset` on, UTF-8 if it is text."""

    offset: int
    n_bytes: int
    is_text: bool


class _BoundedFile:
    """A file that raises EOFError for reads beyond its end: a `read` with a false length allocates nothing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.offset = file.tell()
        self._size = file.seek(0, 2)
        file.seek(self.offset)

    def read(self, n_bytes: int) -> bytes:
        self._advance(n_bytes)
        return self._file.read(n_bytes)

    def readline(self) -> bytes:
        line = self._file.readline(_MAX_STRING_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError("a name in it has no end")
        self._advance(len(line))
        return line

    def skip(self, n_bytes: int) -> None:
        self._advance(n_bytes)
        self._file.seek(n_bytes, 1)

    def _advance(self, n_bytes: int) -> None:
        self.offset += n_bytes
        if self.offset > self._size:
            raise EOFError("a length reaches beyond the end of the file")


# Derived from the pure-Python unpickler: the C version allocates gigabytes if a length in a damaged file is that large.
class TableUnpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """An unpickler that resolves only the names in `known`.

    Dicts have text keys only: the hash of nested tuples can take forever.

    Args:
        file: the pickle, open for reading bytes.
        known: (module, name) -> replacement object. Any other name raises RefusedError. A replacement is called with
            any arguments; its time and memory must not depend on their size.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # type: ignore[attr-defined]
        for name in _OPCODES
    }

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        self._bounded_file = _BoundedFile(file)
        super().__init__(self._bounded_file, encoding="latin1")  # as Paddle does
        self.dispatch = _CountedDispatch(type(self).dispatch)  # type: ignore[misc]
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name from `known`; raise RefusedError for any other."""
        try:
            return self._known[module, name]
        except KeyError:
            raise RefusedError(f"its pickle imports {module}.{name}") from None

    def _string(self: Any, n_bytes: int, is_text: bool) -> None:
        """Push a string of the pickle on the stack: its content if it is short, else a Span."""
        if n_bytes <= _MAX_STRING_BYTES:
            content = self.read(n_bytes)
            self.append(str(content, "utf-8", "surrogatepass") if is_text else content)
            return
        frame = self._unframer.current_frame
        # The file has been read up to the end of the frame, the unpickler only up to the string.
        n_buffered = 0 if frame is None else len(frame.getbuffer()) - frame.tell()
        self.append(Span(self._bounded_file.offset - n_buffered, n_bytes, is_text))
        if not n_buffered:
            self._bounded_file.skip(n_bytes)
        elif n_bytes > n_buffered:
            raise EOFError("a length reaches beyond the end of its frame")
        else:
            frame.seek(n_bytes, 1)

    def _set_items(self: Any, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in items[::2]):
            raise RefusedError("a table in it has a key that is not text")
        table.update(zip(items[::2], items[1::2]))

    def _setitem(self: Any) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items([key, value])

    def _build(self: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, dict):  # PyTorch stores a state dict's module versions as its state; not needed
            return
        if callable(target) or not hasattr(type(target), "__setstate__"):
            raise RefusedError("its pickle sets the state of an unexpected object")
        target.__setstate__(state)

    # The content of a string follows its length, 4 or 8 bytes, little-endian. The last argument is `is_text`.
    dispatch[pickle.BINUNICODE[0]] = lambda self: self._string(*struct.unpack("<I", self.read(4)), True)
    dispatch[pickle.BINUNICODE8[0]] = lambda self: self._string(*struct.unpack("<Q", self.read(8)), True)
    dispatch[pickle.BINBYTES[0]] = lambda self: self._string(*struct.unpack("<I", self.read(4)), False)
    dispatch[pickle.BINBYTES8[0]] = lambda self: self._string(*struct.unpack("<Q", self.read(8)), False)
    dispatch[pickle.BINSTRING[0]] = dispatch[pickle.BINBYTES[0]]  # bytes of Python 2
    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set_items(self.pop_mark())
    dispatch[pickle.BUILD[0]] = _build


class _CountedDispatch(dict[int, Callable[[Any], None]]):
    """The dispatch table of the allowed opcodes; refuses other opcodes, and more than _MAX_OPCODES lookups."""

    n_left = _MAX_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.n_left -= 1
        if self.n_left < 0:
            raise RefusedError(f"its pickle has more than {_MAX_OPCODES} operations")
        operation = self.get(code)
        if operation is None:
            raise RefusedError(f"its pickle has the operation {bytes([code])!r}")
        return operation


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return a tensor's shape, or strides, in a pickle; raise ValueError unless it has up to 8 numbers below 2^48."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) and len(shape) <= MAX_DIMS else (None,)
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise ValueError("a tensor has no valid shape")
    return sizes


def empty_table(*arguments: Any) -> Any:
    """Stand-in for OrderedDict, which is pickled empty and then filled."""
    if arguments:
        raise RefusedError("a table in it is made from another one")
    return {}
