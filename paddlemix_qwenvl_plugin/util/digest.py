"""Digests of large arrays, computed by several threads: keys of images in the caches of a process, never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.util.threads import cpu_threads

_PART_BYTES = 1 << 19
_MAX_THREADS = 8


def digest_of(array: NDArray[Any]) -> bytes:
    """SHA-256 of the SHA-256 digests of a contiguous array's 512 KiB parts, without its shape and dtype."""
    data = array.reshape(-1).view("u1").data
    parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)]
    # Half of the logical CPUs: often two of them share a core's execution units, and two threads on one core then take
    # longer than one thread for the same work.
    n_threads = min(len(parts), cpu_threads() // 2, _MAX_THREADS)
    if n_threads < 2:
        return _sha256(map(_part_digest, parts))
    with ThreadPoolExecutor(n_threads) as pool:  # hashlib releases the GIL
        return _sha256(pool.map(_part_digest, parts))


def _part_digest(part: memoryview) -> bytes:
    return hashlib.sha256(part).digest()


def _sha256(digests: Iterable[bytes]) -> bytes:
    return hashlib.sha256(b"".join(digests)).digest()
