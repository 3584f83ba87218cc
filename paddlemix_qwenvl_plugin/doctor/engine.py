"""Checks of the engine: its libraries, and the requirements to build them."""

from __future__ import annotations

from typing import Any, Optional

from paddlemix_qwenvl_plugin.doctor.report import Check, Status
from paddlemix_qwenvl_plugin.engine import build, gpu, nvrtc, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.machine import cuda_driver
from paddlemix_qwenvl_plugin.util.program import program


def check_engine() -> Check:
    """Check the compiler, the instruction set and the library. Needs no Paddle and builds nothing."""
    command = build.compiler()
    version = build.compiler_version(command).partition("\n")[0] or None
    data: dict[str, Optional[str]] = {
        "device": "cpu",
        "compiler": " ".join(command) if version else None,
        "compiler_version": version,
        "instruction_set": None,
        "state": None,
        "library": None,
        "cache": str(build.cache_folder()),
    }
    try:
        data["instruction_set"] = isa = sources.isas_here(sources.source_folder())[-1].name
        state, path = build.library_state()
    except QwenVLError as error:  # the package lacks the sources
        return Check("engine", "problem", f"engine: {error}", data=data)
    data.update(state=state, library=str(path))
    summary = f"engine: cpu, {isa}"
    if state == "shipped":
        return Check("engine", "ok", f"{summary}, shipped with the package", data=data)
    if state == "built":
        return Check("engine", "ok", f"{summary}, built in {path.parent}", data=data)
    if version is None:
        message = f"{summary}; not built, no C++ compiler {command[0]} found: the portable graph is used"
        return Check("engine", "note", message, "apt-get install g++", data)
    if state == "failed":
        failure = (path.parent / "failed").read_text("utf-8")  # the build's error
        return Check("engine", "problem", f"{summary}; {failure}", f"{program()} build-engine", data)
    message = f"{summary}; not built yet; the first use builds it with {version}"
    return Check("engine", "note", message, f"{program()} build-engine", data)


def check_gpu_engine() -> Check:
    """Check the driver, each GPU, NVRTC, the library and the kernels. Builds nothing."""
    driver = cuda_driver()
    data: dict[str, Any] = {
        "driver": None if driver is None else driver.cuda,
        "gpus": [] if driver is None else [device._asdict() for device in driver.gpus],
        "nvrtc": None,
        "state": None,
        "library": None,
        "kernels": None,
    }
    if driver is None:
        return Check("gpu_engine", "ok", "engine on GPUs: no NVIDIA driver", data=data)
    version = f"driver for {f'CUDA {driver.cuda}' if driver.cuda else 'an unknown version of CUDA'}"
    if not driver.gpus:
        return Check("gpu_engine", "ok", f"engine on GPUs: {version}, which shows no GPU", data=data)
    names = ", ".join(f"{device.name} (sm_{device.architecture})" for device in driver.gpus)
    unusable = {i: error for i in range(len(driver.gpus)) if (error := _gpu_error(i))}
    # A driver that is too old is the same error for each GPU.
    summary = "; ".join((f"engine on GPUs: {names}, {version}", *dict.fromkeys(unusable.values())))
    if len(unusable) == len(driver.gpus):
        return Check("gpu_engine", "note", summary, data=data)
    try:
        data["nvrtc"] = str(gpu.compiler())
        library_state, library = build.library_state(for_gpus=True)
        kernels_state, kernels = build.target_state(gpu.kernels())
    except QwenVLError as error:
        cause, separator, _ = str(error).partition(f": {nvrtc.INSTALL}")
        return Check("gpu_engine", "note", f"{summary}; {cause}", nvrtc.INSTALL if separator else None, data)
    states = {library_state, kernels_state}
    # The worse of the two states; a shipped library counts as built.
    state = next((worst for worst in ("failed", "not built") if worst in states), "built")
    data.update(state=state, library=str(library), kernels=str(kernels))
    summary += f"{';' if unusable else ','} {data['nvrtc']}"
    if state == "built":
        status: Status = "note" if unusable else "ok"
        return Check("gpu_engine", status, f"{summary}, built in {kernels}", data=data)
    fix = f"{program()} build-engine --device gpu"
    if state == "failed":
        failed = (library.parent if library_state == "failed" else kernels) / "failed"
        return Check("gpu_engine", "problem", f"{summary}; {failed.read_text('utf-8')}", fix, data)
    return Check("gpu_engine", "note", f"{summary}; not built yet; the first use builds it", fix, data)


def _gpu_error(index: int) -> Optional[str]:
    """The reason why the engine cannot use a GPU; None if it can."""
    try:
        gpu.usable(index)
    except QwenVLError as error:
        return str(error)
    return None
