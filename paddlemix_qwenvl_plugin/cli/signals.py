"""Signal handling of commands: Ctrl-C, SIGTERM and SIGHUP end a command with cleanup."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Optional

_NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# A signal within this time after one that raised an exception is ignored: it would interrupt the cleanup.
_CLEANUP_SECONDS = 1.0

# Python runs signal handlers between bytecodes, and a call into C++ may take minutes: after this time SIGTERM and
# SIGHUP end the process without cleanup.
_PATIENCE_SECONDS = 8.0

# Module whose import installs Paddle's signal handlers, which print a C++ traceback on stdout, also at SIGTERM.
_PADDLE = "paddle.base"


class Terminated(SystemExit):
    """Termination by SIGTERM or SIGHUP. `code` is 128 plus the signal number, as in shells."""


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGINT and Terminated at SIGTERM and SIGHUP in the block, at most once per second.

    Signals without Python's default handler, such as those ignored beforehand (nohup), are left as they are. If one of
    the handled signals arrived, all of these are ignored after the block, where the command prints its last line and
    exits. Outside the main thread, where Python allows no handlers, only Paddle's handlers are disabled.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    previous_handlers = {number: signal.getsignal(number) for number in _NUMBERS if main_thread}
    default_handlers = (signal.SIG_DFL, signal.default_int_handler)
    handled = [number for number, handler in previous_handlers.items() if handler in default_handlers]
    last_time: Optional[float] = None

    def end(number: int, frame: object) -> None:
        nonlocal last_time
        if last_time is not None and time.monotonic() - last_time < _CLEANUP_SECONDS:
            return
        last_time = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)

    def install() -> None:
        for number in handled:
            signal.signal(number, end)

    finder: Any = _AfterPaddle(install)
    install()
    sys.meta_path.insert(0, finder)
    try:
        with _hard_deadline() if main_thread and os.name == "posix" else contextlib.nullcontext():
            yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for number in handled:
            signal.signal(number, previous_handlers[number] if last_time is None else signal.SIG_IGN)


@contextlib.contextmanager
def _hard_deadline() -> Iterator[None]:
    """End the process from a thread if SIGTERM or SIGHUP does not end the block within _PATIENCE_SECONDS."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    done = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):  # a byte with the number of a signal that arrived
            if number[0] in (signal.SIGTERM, signal.SIGHUP) and not done.wait(_PATIENCE_SECONDS):
                with contextlib.suppress(OSError):
                    os.write(2, b"qwenvl: terminated\n")
                os._exit(128 + number[0])
        os.close(reader)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    previous_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous_fd)
        os.close(writer)


class _AfterPaddle:
    """Finder on sys.meta_path that, after Paddle's import, disables its signal handlers and reinstalls ours."""

    def __init__(self, install: Any) -> None:
        self._install = install

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if name != _PADDLE:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]  # duck-typed
        spec = PathFinder.find_spec(name, path)
        loader: Any = spec and spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.core.disable_signal_handler()
            self._install()

        loader.exec_module = exec_module
        return spec


@contextlib.contextmanager
def handled_by_the_command() -> Iterator[list[int]]:
    """Let a command install its own signal handlers within the block, in place of those of `ending`.

    Within the block, signals have no deadline. The handlers of `ending` are restored after it.

    Yields:
        The signals that end commands, without those that are ignored (nohup); none outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    handlers = {number: signal.getsignal(number) for number in _NUMBERS}
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield [number for number, handler in handlers.items() if handler != signal.SIG_IGN]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
