"""Suppression of warnings while Pillow reads an image, and of what Pillow and libtiff write to stderr."""

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

# Without a handler, Python writes a library's log records to stderr. Handlers that the user configures still get them.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_lock = threading.Lock()
_n_active = 0
_outermost = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress all Python warnings and libtiff's messages in the block; errors are raised as usual.

    Both are settings of the process: the first thread that enters the block changes them, and the last thread that
    leaves it restores them.
    """
    global _n_active
    with _lock:
        _n_active += 1
        if _n_active == 1:
            _outermost.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            _outermost.enter_context(_silent_libtiff())
    try:
        yield
    finally:
        with _lock:
            _n_active -= 1
            if _n_active == 0:
                _outermost.close()


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    setters = _libtiff()
    handlers = [setter(None) for setter in setters]  # a setter returns the previous handler
    try:
        yield
    finally:
        for setter, handler in zip(setters, handlers):
            setter(handler)


@functools.cache
def _libtiff() -> list[ctypes._NamedFuncPointer]:
    """The functions that set libtiff's message handlers; none where this Pillow hides their symbols."""
    try:
        library = ctypes.CDLL(_imaging.__file__)
        setters = [getattr(library, name) for name in _HANDLERS]
    except (OSError, AttributeError, TypeError):
        return []
    for setter in setters:
        setter.restype, setter.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return setters
