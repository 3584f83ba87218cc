"""What is compiled, and with which flags."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

from paddlemix_qwenvl_plugin.util.shipped import shipped_folder

_COMMON = ("-std=gnu++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-DNDEBUG")
_KERNELS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-w")

FLAGS = (*_COMMON, *_KERNELS)


@dataclass(frozen=True)
class Unit:
    """One run of the compiler."""

    name: str
    source: Path
    flags: tuple[str, ...]


def source_folder() -> Path:
    """csrc/ of a source tree, or its copy in an installed package."""
    return shipped_folder("csrc", "engine/csrc")


def units(csrc: Path, paddle_flags: tuple[str, ...]) -> list[Unit]:
    """Everything the library is made of. The kernels, which take longest, come first."""
    include = (f"-I{csrc}", f"-I{csrc / 'include'}")
    x86 = platform.machine() in ("x86_64", "AMD64")
    found = []
    for line in reversed((csrc / "cpu" / "kernels" / "isas.txt").read_text("utf-8").splitlines()):
        name, isa, *flags = line.split()
        if x86 or name == "generic":
            names = (f"-DQVL_KERNELS={name}_kernels", f"-DQVL_KERNELS_ISA={isa}")
            source = csrc / "cpu" / "kernels" / "kernels.cc"
            found.append(Unit(f"kernels_{name}", source, (*_COMMON, *_KERNELS, *flags, *names, *include)))
    for folder, more in (("paddle", paddle_flags), ("core", ()), ("cpu", ())):
        for source in sorted((csrc / folder).glob("*.cc")):
            found.append(Unit(f"{folder}_{source.stem}", source, (*_COMMON, *include, *more)))
    return found


def digest(csrc: Path, *more: str) -> str:
    """Of all source files, their names, and whatever else decides what the library is."""
    value = hashlib.sha256()
    files = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cc", ".txt") and path.is_file()]
    for path in sorted(files):
        value.update(f"{path.relative_to(csrc)}\0".encode() + path.read_bytes() + b"\0")
    for text in more:
        value.update(text.encode() + b"\0")
    return value.hexdigest()[:24]
