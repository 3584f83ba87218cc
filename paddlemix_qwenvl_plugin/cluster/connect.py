"""Connection to a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

DEFAULT = ""
"""Address of `--ray` without a value: RAY_ADDRESS, else this machine's running cluster, else a new local one."""

_CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def connect(address: str = DEFAULT, **options: Any) -> Iterator[None]:
    """Connect to a Ray cluster for a `with` block, without Ray's logs; a cluster started here ends with the block.

    Args:
        address: HOST:PORT of the head node, ray://HOST:PORT, auto (an existing cluster), local (a new one), or DEFAULT.
        options: additional arguments of ray.init.

    Raises:
        UsageError: Ray is not installed, or the address is not valid.
        QwenVLError: the cluster does not answer, or a new one does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else Ray's C++ code logs to stderr
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else each start prints a FutureWarning
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--ray: Ray is not installed ({error}); pip install 'paddlemix-qwenvl-plugin[ray]'"
        ) from error

    _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
    ray._private.worker._worker_logs_enabled = False  # else Ray reports recovered failures on stdout
    previous_handler = signal.getsignal(signal.SIGTERM)
    try:
        with _silent_stderr():
            ray.init(
                address or None,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **{"include_dashboard": False, **options},
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise QwenVLError(f"--ray: cannot connect to {address or 'Ray'} ({error})") from error
    finally:
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, previous_handler)  # Ray's handler skips the caller's cleanup
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that an address accepts connections; Ray itself would retry for a minute.

    DEFAULT, auto and local are accepted unchecked.

    Raises:
        UsageError: the address is not valid.
        QwenVLError: no connection is accepted.
    """
    # HOST:PORT or ray://HOST:PORT, with an IPv6 address in brackets.
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if match is None:
        if address not in ("", "auto", "local"):
            raise UsageError(
                f"--ray: {address!r} is not an address; give HOST:PORT, ray://HOST:PORT, auto or local"
            )
        return
    try:
        socket.create_connection((match[1], int(match[2])), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise QwenVLError(
            f"--ray: no cluster answers at {address} ({error}); start one with: ray start --head"
        ) from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Redirect file descriptor 2 to the null device in the block: Ray's C++ code logs there at startup."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
