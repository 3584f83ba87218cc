"""Memory and GPUs of the machine, without any framework, and the GPUs that Paddle can use."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from typing import NamedTuple, Optional

from paddlemix_qwenvl_plugin.util.control_groups import memory_limit
from paddlemix_qwenvl_plugin.util.paddle_version import require_paddle

GIB = 1024**3


def memory_gib() -> Optional[float]:
    """Total memory that this process may use, in GiB: the machine's, or the limit of its control groups if it is lower.

    None where the platform does not report the machine's memory.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return None
    limit = memory_limit()
    return (total if limit is None else min(total, limit)) / GIB


class Gpu(NamedTuple):
    """A GPU: its name, and its compute capability times ten as `architecture`."""

    name: str
    architecture: int


class CudaDriver(NamedTuple):
    """NVIDIA's driver: the CUDA version that it supports, 12090 for 12.9 or 0 if unknown, and its visible GPUs."""

    version: int
    gpus: list[Gpu]

    @property
    def cuda(self) -> Optional[str]:
        """The CUDA version in the form "12.9"; None if unknown."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}" if self.version else None


def cuda_driver() -> Optional[CudaDriver]:
    """Query NVIDIA's driver without any framework; None if it is not installed, no GPUs if it cannot be initialised."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    try:
        return CudaDriver(_cuda_version(cuda), _cuda_gpus(cuda))
    except AttributeError:  # the library lacks one of the functions
        return CudaDriver(0, [])


def _cuda_version(cuda: ctypes.CDLL) -> int:
    """Version of CUDA that a driver supports; 0 if it does not tell."""
    version = ctypes.c_int()
    return 0 if cuda.cuDriverGetVersion(ctypes.byref(version)) else version.value


def _cuda_gpus(cuda: ctypes.CDLL) -> list[Gpu]:
    """GPUs of a driver; none if it cannot be initialised."""
    number = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
        return []
    found = []
    for ordinal in range(number.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        capability = []
        for attribute in (75, 76):  # compute capability, major and minor
            cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            capability.append(number.value)
        architecture = 10 * capability[0] + capability[1]
        found.append(Gpu(name.value.decode(errors="replace"), architecture))
    return found


def gpus() -> list[str]:
    """Names of the CUDA devices visible to this process."""
    driver = cuda_driver()
    return [gpu.name for gpu in driver.gpus] if driver else []


def paddle_gpus() -> int:
    """Number of CUDA devices that Paddle can use; 0 for a CPU build, and without Paddle.

    Imports Paddle; errors as for `require_paddle`.
    """
    if find_spec("paddle") is None:
        return 0
    require_paddle()
    import paddle

    return int(paddle.device.cuda.device_count()) if paddle.is_compiled_with_cuda() else 0
