"""Run a command in a new process group, so that a timeout or Ctrl-C ends all of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Callable, Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_TICK_SECONDS = 0.2  # between calls of `tick`
_GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL

LOG_MIB = 100
"""Size of the log, in MiB, above which the command is stopped; output of earlier commands counts."""


@dataclass(frozen=True)
class Finished:
    """Outcome of a command.

    `exit_code`: negative for a signal; `seconds`: wall time; `log_full`: stopped because the log exceeded LOG_MIB.
    """

    exit_code: int
    seconds: float
    timed_out: bool = False
    log_full: bool = False


def run(
    argv: list[str],
    env: Mapping[str, str],
    log: BinaryIO,
    timeout_seconds: Optional[float] = None,
    tick: Callable[[float], None] = lambda seconds: None,
) -> Finished:
    """Run `argv` with its output to `log`; `tick` is called periodically with the elapsed seconds.

    Raises:
        QwenVLError: the program cannot be started.
        KeyboardInterrupt, SystemExit: re-raised after the process group was ended.
    """
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            argv, env=dict(env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        raise QwenVLError(f"cannot start {argv[0]}: {error.strerror}") from error
    try:
        while True:
            seconds = time.monotonic() - start
            tick(seconds)
            remaining = _TICK_SECONDS if timeout_seconds is None else timeout_seconds - seconds
            if remaining <= 0:
                _end(process)
                return Finished(process.returncode, time.monotonic() - start, timed_out=True)
            if os.fstat(log.fileno()).st_size > LOG_MIB << 20:
                _end(process)
                return Finished(process.returncode, time.monotonic() - start, log_full=True)
            with contextlib.suppress(subprocess.TimeoutExpired):  # still running: tick again
                code = process.wait(min(remaining, _TICK_SECONDS))
                return Finished(code, time.monotonic() - start)
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then SIGKILL, to the process group, even if a second Ctrl-C interrupts the wait.

    On Windows, only the process itself is terminated.
    """
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # SIGTERM ignored: SIGKILL follows
            process.wait(_GRACE_SECONDS)
    finally:
        _signal(process, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if os.name != "posix":
        process.terminate()
        return
    with contextlib.suppress(ProcessLookupError):  # the group has ended already
        os.killpg(process.pid, number)
