"""The machine: its memory and its GPUs, asked without any framework, and the GPUs that Paddle can use."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Optional

GIB = 1024**3


def memory_gib() -> Optional[float]:
    """Memory this process may use, in GiB: the machine's, or a container's limit when that is lower.

    None where the platform does not tell.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) / GIB if text.isdigit() else total / GIB


def gpus() -> list[str]:
    """Names of the CUDA devices the driver shows to this process, without any framework."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []  # no driver, so no device
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for ordinal in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return names


def paddle_gpus() -> int:
    """How many CUDA devices Paddle can use; 0 in a build for CPUs. Imports Paddle."""
    import paddle

    return int(paddle.device.cuda.device_count()) if paddle.is_compiled_with_cuda() else 0
