"""Source files of the engine's libraries and their compiler flags, as `qwenvl build-engine` and wheels build them.

csrc/CMakeLists.txt, the build of the tests and benchmarks, repeats the flags of the kernels, except -w: it shows
warnings.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paddlemix_qwenvl_plugin.util.shipped import shipped_folder

_COMMON = ("-std=gnu++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-DNDEBUG")
# Fuse multiplication and addition everywhere, so that the result of a row does not depend on its batch. Without
# --param, GCC from version 13 on, or tuned for some processors, does not fuse them in loops with a single sum. Clang
# ignores --param.
_CONTRACT = ("-ffp-contract=fast", "--param=avoid-fma-max-bits=0")
_KERNELS = (*_CONTRACT, "-fno-math-errno", "-fno-trapping-math", "-w")


@dataclass(frozen=True)
class Isa:
    """An ISA for which the CPU kernels are compiled: a line of csrc/cpu/kernels/isas.txt; `code` is its qvl_isa."""

    name: str
    code: str
    flags: tuple[str, ...]

    def runs_here(self) -> bool:
        """Whether this processor supports the ISA."""
        # The flag -mprefer-… selects no feature.
        features = {flag[2:] for flag in self.flags if "=" not in flag and "prefer" not in flag}
        return features <= _cpu_features()


@dataclass(frozen=True)
class Unit:
    """One run of a compiler; `name` is the name of the output file."""

    name: str
    source: Path
    flags: tuple[str, ...]


def source_folder() -> Path:
    """The folder csrc/ of a source tree, or its copy in an installed package."""
    return shipped_folder("csrc", "engine/csrc")


def all_isas(csrc: Path) -> list[Isa]:
    """The ISAs of this processor architecture: generic first, then in ascending order of capability."""
    lines = (csrc / "cpu" / "kernels" / "isas.txt").read_text("utf-8").splitlines()
    isas = [Isa(name, code, tuple(flags)) for name, code, *flags in map(str.split, lines)]
    return isas if platform.machine() in ("x86_64", "AMD64") else isas[:1]


def isas_here(csrc: Path) -> list[Isa]:
    """The ISAs of a build for this machine: generic, the best that it supports and, with avx512_bf16, also avx512.

    QVL_COMPUTE_FLOAT32 needs kernels without bfloat16 products: those of avx512.
    """
    generic, *others = all_isas(csrc)
    supported = [isa for isa in others if isa.runs_here()]
    n_best = 2 if supported and supported[-1].name == "avx512_bf16" else 1
    return [generic, *supported[-n_best:]]


def library_units(csrc: Path, isas: Sequence[Isa]) -> list[Unit]:
    """Compiler runs for `libqwenvl.so`; the kernels come first because they take longest.

    In a build for a machine with a better ISA, the generic kernels serve only for comparison and are compiled without
    optimisation, which would take most of the compile time. In a build of all ISAs, each ISA is the best one of some
    machine.
    """
    found = []
    for isa in reversed(isas):
        for_comparison = isa.name == "generic" and len(isas) > 1 and list(isas) != all_isas(csrc)
        level = "-O0" if for_comparison else "-O3"
        names = (f"-DQVL_KERNELS={isa.name}_kernels", f"-DQVL_KERNELS_ISA={isa.code}")
        for stem in ("kernels", "groups"):
            path = csrc / "cpu" / "kernels" / f"{stem}.cc"
            found.append(Unit(f"{stem}_{isa.name}.o", path, (*_COMMON, *_KERNELS, level, *isa.flags, *names)))
    excluded = tuple(f"-DQVL_WITHOUT_{isa.name.upper()}" for isa in all_isas(csrc) if isa not in isas)
    for folder in ("core", "cpu"):
        for source in sorted((csrc / folder).glob("*.cc")):
            found.append(_unit(source, *excluded))
    return found


def operators_units(csrc: Path, paddle_flags: Sequence[str]) -> list[Unit]:
    """Compiler runs for `libqwenvl_paddle.so`."""
    return [_unit(source, *paddle_flags) for source in sorted((csrc / "paddle").glob("*.cc"))]


def cuda_units(csrc: Path) -> list[Unit]:
    """Compiler runs for `libqwenvl_cuda.so`, which is built without CUDA and needs the driver and kernels to run."""
    # The files of csrc/core/ that the GPU part uses: it is not linked to libqwenvl.so.
    core = [
        path for path in sorted((csrc / "core").glob("*.cc")) if path.stem in ("config", "pack", "rotary")
    ]
    return [_unit(source) for source in (*sorted((csrc / "cuda").glob("*.cc")), *core)]


def kernel_units(csrc: Path, architectures: Iterable[int]) -> list[Unit]:
    """Compiler runs for the GPU kernels: every file for every architecture, in float16, from 80 on also in bfloat16.

    Args:
        architectures: compute capabilities times ten.
    """
    units = []
    for architecture in architectures:
        # 9.0 is compiled as sm_90a, which has instructions that later GPUs lack.
        code = "sm_90a" if architecture == 90 else f"sm_{architecture}"
        flags = ("--std=c++17", f"--gpu-architecture={code}")
        for source in sorted((csrc / "cuda" / "kernels").glob("*.cu")):
            units.append(Unit(f"{source.stem}.{code}.f16.cubin", source, flags))
            if architecture >= 80:
                bfloat16 = (*flags, "-DQVL_COMPUTE_BFLOAT16")
                units.append(Unit(f"{source.stem}.{code}.bf16.cubin", source, bfloat16))
    return units


def digest(csrc: Path, folders: Iterable[str], *texts: str) -> str:
    """Cache key: digest of the names and contents of all files in some folders of csrc/, and of `texts`."""
    value = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (csrc / folder).rglob("*") if path.is_file()):
        value.update(f"{path.relative_to(csrc)}\0".encode() + path.read_bytes() + b"\0")
    for text in texts:
        value.update(text.encode() + b"\0")
    return value.hexdigest()[:24]


def _unit(source: Path, *flags: str) -> Unit:
    return Unit(f"{source.parent.name}_{source.stem}.o", source, (*_COMMON, *flags))


def _cpu_features() -> set[str]:
    """Features of this processor, spelled as the compiler's -m flags; empty if the system does not report them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return {flag.replace("avx512_", "avx512") for flag in flags}
