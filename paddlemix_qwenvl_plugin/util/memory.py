"""Address space left under `ulimit -v`.

Libraries that exceed this limit abort the process, hang, or report an unrelated error: check it first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError


def address_space_left() -> Optional[int]:
    """Bytes of address space left under this process's limit (`ulimit -v`); None without a limit.

    Where the platform has no /proc/self/statm, the whole limit counts as left.
    """
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
    return max(0, limit - used)


def require_addresses(what: str, mib: int) -> None:
    """Raise QwenVLError if the address space limit leaves less than the `mib` MiB that `what` takes."""
    left = address_space_left()
    if left is not None and left < mib << 20:
        raise QwenVLError(
            f"out of memory: {what} takes {mib} MiB of address space, and a limit (ulimit -v) leaves {left >> 20}"
        )
