"""Search for NVRTC, NVIDIA's run-time compiler, and its headers in pip wheels and CUDA toolkits."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

INSTALL = "pip install 'paddlemix-qwenvl-plugin[gpu-engine]'"

_MAJORS = (13, 12)  # supported major versions of NVRTC
_NAMES = tuple(f"libnvrtc.so.{major}" for major in _MAJORS)
_SYSTEM = Path("/usr")  # prefix of the headers that a distribution installs


class Nvrtc(NamedTuple):
    """An NVRTC library: path or name, version, architectures (compute capabilities times ten), header folders."""

    library: str
    version: tuple[int, int]
    architectures: frozenset[int]
    include: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"


def find(architectures: Collection[int], newest: int) -> Nvrtc:
    """Find the first NVRTC that has headers, compiles for all given architectures, and is no newer than `newest`.

    Args:
        architectures: compute capabilities times ten.
        newest: newest major version of CUDA that the driver supports; 99 to compile for another machine.

    Raises:
        QwenVLError: no suitable NVRTC; the message names the package to install.
    """
    problems = []
    for library in _libraries():
        candidate = _opened(library)
        if candidate is None:
            continue
        missing = [f"sm_{number}" for number in architectures if number not in candidate.architectures]
        include = _include(library)
        if candidate.version[0] > newest:
            problems.append(f"{library} is {candidate}, and the NVIDIA driver knows CUDA {newest} only")
        elif missing:
            problems.append(f"{library} is {candidate}, which cannot compile for {', '.join(missing)}")
        elif not include:
            problems.append(f"{library} is {candidate}, without its header cuda_fp16.h")
        else:
            return candidate._replace(include=include)
    if not problems:
        problems.append("no NVRTC (libnvrtc.so.12 or libnvrtc.so.13), which compiles the GPU kernels")
    raise QwenVLError(f"{problems[0]}: {INSTALL}")


def _libraries() -> Iterator[str]:
    """Yield candidates: paths, the newer version of a kind of installation first; then names for the dynamic loader."""
    patterns = ("nvidia/*/lib/libnvrtc.so.*", "paddle/libs/libnvrtc*.so*", "torch/lib/libnvrtc*.so*")
    for folder in _sites():
        for pattern in patterns:
            for path in sorted(folder.glob(pattern), key=_version_and_path, reverse=True):
                # Skip NVRTC's other libraries, which match the patterns as well.
                if not any(word in path.name for word in ("builtins", ".alt.")):
                    yield str(path)
    for toolkit in _toolkits():
        yield from map(str, sorted(toolkit.glob("lib64/libnvrtc.so.1?"), reverse=True))
    yield from _NAMES


def _version_and_path(path: Path) -> tuple[str, Path]:
    # The path alone would order nvidia/cuda_nvrtc, of CUDA 12, before nvidia/cu13.
    return path.name.partition(".so")[2], path


def _opened(library: str) -> Optional[Nvrtc]:
    """Load a candidate; None if it cannot be loaded or has an unsupported version."""
    try:
        nvrtc = ctypes.CDLL(library)
    except OSError:
        return None
    major, minor, n_architectures = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if major.value not in _MAJORS:
        return None
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(n_architectures))
    architectures = (ctypes.c_int * n_architectures.value)()
    nvrtc.nvrtcGetSupportedArchs(architectures)
    return Nvrtc(library, (major.value, minor.value), frozenset(architectures))


def _include(library: str) -> tuple[Path, ...]:
    """Header folders, those of the library's installation preferred; empty if cuda_fp16.h is not found."""
    prefix = Path(library).parents[1] if "/" in library else _SYSTEM
    roots = [prefix / "include", prefix.parent / "cuda_runtime" / "include"]
    for folder in _sites():
        roots += [path / "include" for path in sorted(folder.glob("nvidia/*"), reverse=True)]
    roots += [path / "include" for path in (*_toolkits(), _SYSTEM)]
    for root in roots:
        if (root / "cuda_fp16.h").is_file():
            # cuda_fp16.h includes headers that are built into some versions of NVRTC, and in these folders for others.
            cccl_folders = (root / "cccl", root.parents[1] / "cuda_cccl" / "include")
            return (root, *(folder for folder in cccl_folders if folder.is_dir()))
    return ()


def _sites() -> list[Path]:
    """Folders from which Python imports packages, in order."""
    return [Path(path) for path in dict.fromkeys(sys.path) if path]


def _toolkits() -> list[Path]:
    configured = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [Path(path) for path in (*configured, "/usr/local/cuda") if path]
