"""Connection to a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from typing import Any

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

DEFAULT = ""
"""Address for `--ray` without one: RAY_ADDRESS, else the cluster of this machine, else a new one in this process."""

_SECONDS = 5.0


@contextlib.contextmanager
def connect(address: str = DEFAULT, **options: Any) -> Iterator[None]:
    """Connect to a cluster for the block, with quiet logs; a cluster that this starts ends with the block.

    Args:
        address: HOST:PORT of the head node, ray://HOST:PORT, auto (an existing cluster), local (a new one), or DEFAULT.
        options: further arguments of ray.init.

    Raises:
        UsageError: Ray is not installed.
        QwenVLError: the cluster does not answer.
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
    before = signal.getsignal(signal.SIGTERM)
    try:
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
            signal.signal(signal.SIGTERM, before)  # Ray's own handler skips the caller's cleanup
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise QwenVLError unless the host of an address accepts connections: Ray itself would try for a minute."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if found is None:
        if address not in ("", "auto", "local"):
            raise UsageError(
                f"--ray: {address!r} is not an address; give HOST:PORT, ray://HOST:PORT, auto or local"
            )
        return
    try:
        socket.create_connection((found[1], int(found[2])), _SECONDS).close()
    except (OSError, OverflowError) as error:
        raise QwenVLError(
            f"--ray: no cluster answers at {address} ({error}); start one with: ray start --head"
        ) from error
