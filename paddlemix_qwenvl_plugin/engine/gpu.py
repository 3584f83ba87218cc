"""The engine on GPUs: whether there is one that it runs on, and its library and kernels, built and loaded."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.engine import build, nvrtc
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.machine import CudaDriver, Gpu, cuda_driver

_OLDEST_DRIVER = 12
_OLDEST_GPU = 70


def gpu_index(device: str, flag: str = "--device") -> Optional[int]:
    """Which GPU "gpu" or "gpu:N" is, which `flag` gave; None for "cpu".

    Raises:
        UsageError: another word.
    """
    if not re.fullmatch(r"cpu|gpu(:[0-9]{1,4})?", device):
        raise UsageError(f"{flag} {device}: must be cpu, gpu or gpu:N")
    return None if device == "cpu" else int(device.partition(":")[2] or 0)


def usable(index: int) -> Gpu:
    """GPU `index` of those that the driver shows to this process.

    Raises:
        UsageError: it is not there, or the engine does not run on it.
    """
    gpus = _driver().gpus
    if index >= len(gpus):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
        raise UsageError(f"--device gpu:{index}: the NVIDIA driver shows {len(gpus)} GPU(s) here{why}")
    gpu = gpus[index]
    if gpu.architecture < _OLDEST_GPU:
        raise UsageError(
            f"--device gpu:{index}: {gpu.name} has compute capability {gpu.architecture / 10}; "
            f"the engine needs {_OLDEST_GPU / 10}"
        )
    return gpu


def compiler() -> nvrtc.Nvrtc:
    """The NVRTC for the kernels of all GPUs here that the engine runs on.

    Raises:
        QwenVLError: no driver, or no NVRTC.
    """
    return nvrtc.find(_architectures(), _driver().version // 1000)


def kernels() -> build.Target:
    """The kernels for all GPUs here that the engine runs on. Errors as for `compiler`."""
    return build.kernel_target(compiler(), _architectures())


def _architectures() -> set[int]:
    return {gpu.architecture for gpu in _driver().gpus if gpu.architecture >= _OLDEST_GPU}


def build_for(index: int, allowed: bool = False) -> tuple[Path, Path]:
    """The library for GPUs and the folder of kernels, built now if need be; `allowed` as for build.library.

    Raises:
        UsageError, QwenVLError: GPU `index` cannot be used, or something cannot be built.
    """
    usable(index)
    folder = env.CUDA_KERNELS.read()
    if folder is not None:
        return build.cuda_library(allowed), folder
    target = kernels()  # where NVRTC is missing, nothing else is built first
    return build.cuda_library(allowed), build.built(target, allowed)


@functools.cache
def load(index: int) -> None:
    """Have the engine's library find its part for GPUs, and that find its kernels. Errors as for `build_for`."""
    library, folder = build_for(index)
    # libqwenvl.so asks the system's loader for it by its name, which is known from now on.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ[env.CUDA_KERNELS.name] = str(folder)


def _driver() -> CudaDriver:
    driver = cuda_driver()
    if driver is None:
        raise UsageError(
            "--device gpu: there is no NVIDIA driver (libcuda.so.1); install it or use --device cpu"
        )
    if driver.version < 1000 * _OLDEST_DRIVER:
        raise UsageError(
            f"--device gpu: the NVIDIA driver knows CUDA {driver.cuda} only; "
            f"install one for CUDA {_OLDEST_DRIVER} or newer"
        )
    return driver
