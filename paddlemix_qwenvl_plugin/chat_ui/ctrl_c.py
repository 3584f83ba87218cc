"""What Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_ctrl_c(call: Callable[[], object]) -> Iterator[None]:
    """Have Ctrl-C call this. Outside of the main thread there are no signals, and this is an error."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """Break off what is being done."""
    raise KeyboardInterrupt


def nothing() -> None:
    """Let it pass."""
