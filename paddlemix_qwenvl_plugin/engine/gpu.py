"""The engine on GPUs: selection of the device, and building and loading of the library and kernels."""

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

_MIN_CUDA = 12  # major version of CUDA that the driver supports
_MIN_ARCHITECTURE = 70  # compute capability times ten


def gpu_index(device: str, flag: str = "--device") -> Optional[int]:
    """Parse a device, "gpu" (the first GPU) or "gpu:N", into a GPU's index; None for "cpu".

    Raises:
        UsageError: any other text; the message names `flag`.
    """
    if not re.fullmatch(r"cpu|gpu(:[0-9]{1,4})?", device):
        raise UsageError(f"{flag} {device}: must be cpu, gpu or gpu:N")
    return None if device == "cpu" else int(device.partition(":")[2] or 0)


def usable(index: int) -> Gpu:
    """Check that the engine runs on GPU `index`, counted among the GPUs visible to this process, and return the GPU.

    Raises:
        UsageError: the driver or the GPU is missing, or too old for the engine.
    """
    gpus = _driver().gpus
    if index >= len(gpus):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        raise UsageError(f"--device gpu:{index}: the NVIDIA driver shows {len(gpus)} GPU(s) here{hint}")
    gpu = gpus[index]
    if gpu.architecture < _MIN_ARCHITECTURE:
        raise UsageError(
            f"--device gpu:{index}: {gpu.name} has compute capability {gpu.architecture / 10}; "
            f"the engine needs {_MIN_ARCHITECTURE / 10}"
        )
    return gpu


def compiler() -> nvrtc.Nvrtc:
    """Find the NVRTC that compiles the kernels for all supported GPUs of this machine.

    Raises:
        UsageError, QwenVLError: no driver for CUDA 12 or newer, or no suitable NVRTC.
    """
    return nvrtc.find(_architectures(), _driver().version // 1000)


def kernels() -> build.Target:
    """Build target of the kernels for all supported GPUs of this machine. Errors as for `compiler`."""
    return build.kernel_target(compiler(), _architectures())


def _architectures() -> set[int]:
    return {gpu.architecture for gpu in _driver().gpus if gpu.architecture >= _MIN_ARCHITECTURE}


def build_for(index: int, allowed: bool = False) -> tuple[Path, Path]:
    """Paths of the library for GPUs and of the folder of kernels, built now if necessary.

    Kernels are not built if QWENVL_CUDA_KERNELS names their folder.

    Args:
        index: the GPU.
        allowed: as for build.library.

    Raises:
        UsageError, QwenVLError: GPU `index` cannot be used, or a build failed.
    """
    usable(index)
    folder = env.CUDA_KERNELS.read()
    if folder is not None:
        return build.cuda_library(allowed), folder
    target = kernels()  # before the library, which is useless if NVRTC is missing
    return build.cuda_library(allowed), build.built(target, allowed)


@functools.cache
def load(index: int) -> None:
    """Load the engine's part for GPUs and set the path of its kernels. Errors as for `build_for`."""
    library, folder = build_for(index)
    # If libqwenvl.so is in another folder, it later opens this library by its name alone, which the dynamic loader
    # resolves to the loaded one.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ[env.CUDA_KERNELS.name] = str(folder)


def _driver() -> CudaDriver:
    driver = cuda_driver()
    if driver is None:
        raise UsageError(
            "--device gpu: no NVIDIA driver found (libcuda.so.1); install it or use --device cpu"
        )
    if driver.version < 1000 * _MIN_CUDA:
        known = f"knows CUDA {driver.cuda} only" if driver.cuda else "does not report its CUDA version"
        raise UsageError(
            f"--device gpu: the NVIDIA driver {known}; install one for CUDA {_MIN_CUDA} or newer"
        )
    return driver
