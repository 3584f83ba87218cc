"""The engine: whether it is there, and whether it can be made."""

from __future__ import annotations

from typing import Optional

from paddlemix_qwenvl_plugin.doctor.report import Check
from paddlemix_qwenvl_plugin.engine import build, sources
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.program import program


def check_engine() -> Check:
    """Compiler, instruction set, library. Needs no Paddle and builds nothing."""
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
    except QwenVLError as error:  # a package without its sources
        return Check("engine", "problem", f"engine: {error}", data=data)
    data.update(state=state, library=str(path))
    where = f"engine: cpu, {isa}"
    if state == "shipped":
        return Check("engine", "ok", f"{where}, shipped with the package", data=data)
    if state == "built":
        return Check("engine", "ok", f"{where}, built in {path.parent}", data=data)
    if version is None:
        message = f"{where}; not built, and there is no C++ compiler {command[0]}: the portable graph is used"
        return Check("engine", "note", message, "apt-get install g++", data)
    if state == "failed":
        said = (path.parent / "failed").read_text("utf-8")
        return Check("engine", "problem", f"{where}; {said}", f"{program()} build-engine", data)
    message = f"{where}; not built so far, its first use builds it with {version}"
    return Check("engine", "note", message, f"{program()} build-engine", data)
