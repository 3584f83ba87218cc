"""Checks of Python, Paddle and the GPUs."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Optional

from packaging.version import Version

from paddlemix_qwenvl_plugin.doctor.probe import Answer, one_line
from paddlemix_qwenvl_plugin.doctor.report import Check, Status
from paddlemix_qwenvl_plugin.upstream import pins
from paddlemix_qwenvl_plugin.util.paddle_version import MINIMUM

PYTHONS = ((3, 9), (3, 12))  # oldest and newest supported versions
_FIRST_UNTESTED = "3.4"  # oldest version of Paddle that is newer than the tested ones
_RANGE = f">={MINIMUM},<{_FIRST_UNTESTED}"

INSTALL_CPU = f"pip install 'paddlepaddle{_RANGE}' setuptools"
# PyPI has no recent enough GPU wheel.
INSTALL_GPU = (
    "pip uninstall -y paddlepaddle paddlepaddle-gpu; "
    f"pip install --extra-index-url \"$PADDLE_INDEX\" 'paddlepaddle-gpu{_RANGE}' setuptools"
)
_INDEX = "PADDLE_INDEX is the address that Paddle's installation guide gives for your CUDA"


@dataclass(frozen=True)
class Gpu:
    """A GPU. `architecture`: compute capability times ten; `driver`: version of its driver; None if unknown."""

    name: str
    architecture: Optional[int]
    driver: Optional[str] = None

    def __str__(self) -> str:
        return self.name if self.architecture is None else f"{self.name} (sm_{self.architecture})"


def check_python() -> Check:
    """Check the Python version."""
    oldest, newest = (".".join(map(str, version)) for version in PYTHONS)
    data = {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Check("python", "ok", f"Python {data['version']}", data=data)
    message = f"Python {data['version']} is untested; {oldest} to {newest} are supported"
    return Check("python", "note", message, data=data)


def check_paddle(versions: Mapping[str, str], found: bool, answer: Answer, has_fix: bool) -> Check:
    """Check that one recent enough Paddle is installed and can be imported.

    Args:
        versions: distribution -> version; the names in lower case with hyphens.
        found: whether a module `paddle` exists.
        answer: result of questions.paddle.
        has_fix: whether another check names the fix of a failing import.
    """
    wheels = {name: version for name, version in versions.items() if _is_paddle(name)}
    data = {
        "distributions": wheels,
        "version": answer.value.get("version"),
        "gpu_build": answer.value.get("gpu_build"),
        "cuda": answer.value.get("cuda"),
        "architectures": answer.value.get("architectures"),
        "cause": answer.cause if found else None,
    }
    if not found:
        return Check("paddle", "problem", "Paddle is not installed", INSTALL_CPU, data)
    gpu_wheel = "paddlepaddle-gpu" in wheels
    install = INSTALL_GPU if gpu_wheel else INSTALL_CPU
    hint = f" ({_INDEX})" if gpu_wheel else ""
    description = " and ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        message = f"{description} are installed together and have overwritten each other's files{hint}"
        if not gpu_wheel:
            install = f"pip uninstall -y {' '.join(wheels)}; {INSTALL_CPU}"
        return Check("paddle", "problem", message, install, data)
    description = description or f"Paddle {data['version'] or 'of unknown version'}"
    if wheels and Version(next(iter(wheels.values()))) < Version(MINIMUM):
        cause = f"; nor does it import: {answer.cause}" if answer.cause else ""
        message = f"{description} is too old, {MINIMUM} or newer is needed{cause}{hint}"
        return Check("paddle", "problem", message, install, data)
    if answer.cause:
        reinstall = install.replace("pip install", "pip install --force-reinstall", 1)
        message = f"{description}: import paddle fails: {answer.cause}{'' if has_fix else hint}"
        return Check("paddle", "problem", message, None if has_fix else reinstall, data)
    build = f"GPU build for CUDA {data['cuda']}" if data["gpu_build"] else "no build for NVIDIA GPUs"
    if set(wheels) == {"paddlepaddle"} and not data["gpu_build"]:
        build = "CPU build"
    if wheels and Version(next(iter(wheels.values()))) >= Version(_FIRST_UNTESTED):
        return Check(
            "paddle", "note", f"{description}, {build}; newer than the tested versions ({_RANGE})", data=data
        )
    return Check("paddle", "ok", f"{description}, {build}", data=data)


def _is_paddle(distribution: str) -> bool:
    """Whether a distribution is a build of Paddle for any device; all builds share the module `paddle`."""
    return distribution == "paddlepaddle" or distribution.startswith("paddlepaddle-")


def machine_gpus(visible: Sequence[str]) -> tuple[list[Gpu], Optional[str]]:
    """List the machine's GPUs with nvidia-smi; return them and the error message of nvidia-smi, if any.

    Fallback if nvidia-smi is missing or fails: `visible`, the GPUs visible to this process through the CUDA driver.
    """
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return [Gpu(name, None) for name in visible], None
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Gpu(name, None) for name in visible], one_line(f"nvidia-smi: {error}")
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        return [Gpu(name, None) for name in visible], one_line(f"nvidia-smi: {lines[0]}")
    gpus = []
    for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True):
        if len(row) == 3:
            name, capability, driver = row
            number = capability.replace(".", "", 1)
            gpus.append(Gpu(name, int(number) if number.isdigit() else None, driver))
    return gpus, None


def check_gpu(paddle: Check, answer: Answer, visible: Sequence[str]) -> Check:
    """Check that this Paddle has machine code for the machine's GPUs, and that it adds two numbers on the first.

    Args:
        paddle: result of `check_paddle`.
        answer: result of questions.gpu; ignored if Paddle cannot be imported or is not a GPU build.
        visible: names of the GPUs visible to this process through the CUDA driver.
    """
    gpus, smi_error = machine_gpus(visible)
    is_gpu_build = bool(paddle.data["gpu_build"])
    paddle_gpus = [Gpu(**gpu) for gpu in answer.value.get("gpus", [])] if is_gpu_build else []
    gpus = gpus or paddle_gpus
    installed = paddle.data["distributions"].get("paddlepaddle-gpu")
    wheel = next((wheel for wheel in pins.load().gpu_wheels if wheel.version == installed), None)
    architectures = list(wheel.architectures) if wheel else paddle.data["architectures"] or []
    data = {
        "gpus": [asdict(gpu) for gpu in gpus],
        "visible": list(visible),
        "architectures": architectures,
        "cause": (answer.cause if is_gpu_build else None) or smi_error,
    }

    def result(status: Status, message: str, fix: Optional[str] = None) -> Check:
        return Check("gpu", status, message + (f" ({_INDEX})" if fix else ""), fix, data)

    names = ", ".join(map(str, gpus))
    if not gpus:
        reason = smi_error or "no NVIDIA GPU seen"
        if is_gpu_build:
            return result("note", f"{reason}; this GPU build of Paddle runs on the CPU")
        return result("note" if smi_error else "ok", reason)
    unsupported = [
        gpu for gpu in gpus if gpu.architecture is not None and not _has_code(architectures, gpu.architecture)
    ]
    if (is_gpu_build or wheel) and architectures and unsupported:
        code_list = "sm_" + ", ".join(map(str, architectures))
        gpu_list = ", ".join(map(str, unsupported))
        lacking = f"{gpu_list}: this Paddle has no machine code for it; it has code for {code_list}"
        # A wheel with `ptx: false` in pins.yaml is a problem even if the addition in questions.gpu succeeded: a few of
        # its kernels have PTX, and the addition may use one of these, but most have none.
        if (wheel is not None and not wheel.ptx) or answer.cause:
            return result("problem", lacking, INSTALL_GPU)
        runs = "runs" if paddle_gpus else "may run"
        return result("note", f"{lacking} and {runs} on it from PTX, which is translated at the first start")
    if paddle.data["gpu_build"] is None:
        return result("note", f"{names}; no Paddle that can be imported to use it")
    if not is_gpu_build:
        return result("ok", f"{names}, used by the engine only: this Paddle is no GPU build")
    if answer.cause:
        return result("problem", f"{names}: a test addition on the GPU fails: {answer.cause}")
    if not paddle_gpus:
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        cause = "" if devices is None else f"; CUDA_VISIBLE_DEVICES is {devices!r}"
        return result("note", f"{names}, which Paddle does not see{cause}")
    return result("ok", f"{names}, and Paddle runs on it")


def _has_code(architectures: Sequence[int], architecture: int) -> bool:
    # Machine code runs on GPUs of the same major version with the same or a higher minor version.
    return any(code // 10 == architecture // 10 and code <= architecture for code in architectures)
