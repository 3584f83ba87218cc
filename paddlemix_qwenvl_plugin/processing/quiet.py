"""Pillow without what it and its libraries write to stderr."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Iterator

from PIL import _imaging

_HANDLERS = ("TIFFSetErrorHandler", "TIFFSetWarningHandler")

# Without a handler, Python writes what a library logs to stderr; those of the user's get it still.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_lock = threading.Lock()
_n_inside = 0
_outermost = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of Pillow's and no lines of libtiff's; errors are raised as ever.

    Both are settings of the whole process: the first thread inside changes them, the last one puts them back.
    """
    global _n_inside
    with _lock:
        _n_inside += 1
        if _n_inside == 1:
            _outermost.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _outermost.enter_context(_silent_libtiff())
    try:
        yield
    finally:
        with _lock:
            _n_inside -= 1
            if _n_inside == 0:
                _outermost.close()


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    setters = _libtiff()
    before = [setter(None) for setter in setters]
    try:
        yield
    finally:
        for setter, handler in zip(setters, before):
            setter(handler)


@functools.cache
def _libtiff() -> list[ctypes._NamedFuncPointer]:
    """What sets the functions that libtiff calls with its lines; none where this Pillow hides them."""
    try:
        library = ctypes.CDLL(_imaging.__file__)
        setters = [getattr(library, name) for name in _HANDLERS]
    except (OSError, AttributeError, TypeError):
        return []
    for setter in setters:
        setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return setters
