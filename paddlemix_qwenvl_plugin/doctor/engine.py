"""Checks of the engine: its libraries, and the requirements to build them."""

from __future__ import annotations

from typing import Any, Optional

from paddlemix_qwenvl_plugin.doctor.report import Check
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
    where = f"engine: cpu, {isa}"
    if state == "shipped":
        return Check("engine", "ok", f"{where}, shipped with the package", data=data)
    if state == "built":
        return Check("engine", "ok", f"{where}, built in {path.parent}", data=data)
    if version is None:
        message = f"{where}; not built, no C++ compiler {command[0]} found: the portable graph is used"
        return Check("engine", "note", message, "apt-get install g++", data)
    if state == "failed":
        failure = (path.parent / "failed").read_text("utf-8")
        return Check("engine", "problem", f"{where}; {failure}", f"{program()} build-engine", data)
    message = f"{where}; not built yet; the first use builds it with {version}"
    return Check("engine", "note", message, f"{program()} build-engine", data)


def check_gpu_engine() -> Check:
    """Check the driver, the GPUs, NVRTC, the library and the kernels. Builds nothing."""
    driver = cuda_driver()
    data: dict[str, Any] = {
        "driver": None if driver is None else driver.cuda,
        "gpus": [] if driver is None else [each._asdict() for each in driver.gpus],
        "nvrtc": None,
        "state": None,
        "library": None,
        "kernels": None,
    }
    if driver is None or not driver.gpus:
        seen = "no NVIDIA driver" if driver is None else f"driver for CUDA {driver.cuda}, which shows no GPU"
        return Check("gpu_engine", "ok", f"engine on GPUs: {seen}", data=data)
    names = ", ".join(f"{each.name} (sm_{each.architecture})" for each in driver.gpus)
    where = f"engine on GPUs: {names}, driver for CUDA {driver.cuda}"
    try:
        gpu.usable(0)
        data["nvrtc"] = str(gpu.compiler())
        library_state, library = build.library_state(for_gpus=True)
        kernels_state, kernels = build.target_state(gpu.kernels())
    except QwenVLError as error:
        cause, fix, _ = str(error).partition(f": {nvrtc.INSTALL}")
        return Check("gpu_engine", "note", f"{where}; {cause}", nvrtc.INSTALL if fix else None, data)
    states = {library_state, kernels_state}
    state = next((each for each in ("failed", "not built") if each in states), "built")
    data.update(state=state, library=str(library), kernels=str(kernels))
    where += f", {data['nvrtc']}"
    if state == "built":
        return Check("gpu_engine", "ok", f"{where}, built in {kernels}", data=data)
    again = f"{program()} build-engine --device gpu"
    if state == "failed":
        failed = (library.parent if library_state == "failed" else kernels) / "failed"
        return Check("gpu_engine", "problem", f"{where}; {failed.read_text('utf-8')}", again, data)
    return Check("gpu_engine", "note", f"{where}; not built yet; the first use builds it", again, data)
