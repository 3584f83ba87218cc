"""Compile GPU kernels with NVRTC in a separate process, which may crash or be killed.

    python nvrtc_compile.py LIBNVRTC OPTION… -c SOURCE -o CUBIN

Run as a file, it imports neither the package nor its dependencies.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path


def compile_kernels(library: str, options: list[str], source: Path, cubin: Path) -> int:
    """Compile a source file to a cubin, print NVRTC's log to stdout, and return the exit code."""
    nvrtc = _load(library)
    program = ctypes.c_void_p()
    text = source.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None)
    c_options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = nvrtc.nvrtcCompileProgram(program, len(options), c_options)
    print(_bytes(nvrtc, "ProgramLog", program).rstrip(b"\0\n").decode("utf-8", "replace"))
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        print(f"{source.name}: error: {nvrtc.nvrtcGetErrorString(result).decode()}")
        return 1
    cubin.write_bytes(_bytes(nvrtc, "CUBIN", program))
    return 0


def _load(library: str) -> ctypes.CDLL:
    """Load NVRTC after its library of built-in functions, which NVRTC from CUDA 13 wheels cannot find."""
    if "/" in library:
        for builtins in Path(library).parent.glob("libnvrtc-builtins.so.*"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(builtins))
    return ctypes.CDLL(library)


def _bytes(nvrtc: ctypes.CDLL, output: str, program: ctypes.c_void_p) -> bytes:
    """Get an output of the compilation, "ProgramLog" or "CUBIN"."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{output}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{output}")(program, buffer)
    return buffer.raw


if __name__ == "__main__":
    _, nvrtc_path, *arguments, _c, source_path, _o, cubin_path = sys.argv
    sys.exit(compile_kernels(nvrtc_path, arguments, Path(source_path), Path(cubin_path)))
