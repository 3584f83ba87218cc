"""Fake CUDA driver and NVRTC in a few lines of C, for machines without these libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Up to two GPUs, "First" with the handle 0 and "Second" with the handle 7. The attributes 75 and 76 are the major and
# minor compute capability: FAKE_MAJOR.6 and, of the second GPU, (FAKE_MAJOR + 1).6. 100 is CUDA_ERROR_NO_DEVICE, 3
# CUDA_ERROR_NOT_INITIALIZED.
DRIVER = """
#include <stdlib.h>
#include <string.h>
static int number(const char* name) { return atoi(getenv(name)); }
static int major() { return getenv("FAKE_MAJOR") ? number("FAKE_MAJOR") : 8; }
int cuDriverGetVersion(int* version) { *version = number("FAKE_CUDA"); return *version ? 0 : 3; }
int cuInit(unsigned flags) { return number("FAKE_GPUS") ? 0 : 100; }
int cuDeviceGetCount(int* n) { *n = number("FAKE_GPUS"); return 0; }
int cuDeviceGet(int* device, int i) { *device = 7 * i; return 0; }
int cuDeviceGetName(char* name, int n, int device) { strncpy(name, device == 7 ? "Second" : "First", n); return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? major() + device / 7 : attribute == 76 ? 6 : -1;
  return 0;
}
"""

# The compiled code is a copy of the source. Compilation fails if the source contains FAIL or if the library BUILTINS
# cannot be opened, and aborts the process if the source contains CRASH. 18 is the size of the log with its final NUL.
NVRTC = """
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
static const int archs[] = {ARCHS};
static char* text;
int nvrtcVersion(int* major, int* minor) { *major = MAJOR; *minor = MINOR; return 0; }
int nvrtcGetNumSupportedArchs(int* n) { *n = sizeof archs / sizeof *archs; return 0; }
int nvrtcGetSupportedArchs(int* to) { memcpy(to, archs, sizeof archs); return 0; }
int nvrtcCreateProgram(void** program, const char* source, const char* name, int n, void* a, void* b) {
  text = strdup(source);
  *program = text;
  return 0;
}
int nvrtcCompileProgram(void* program, int n, const char** options) {
#ifdef BUILTINS
  if (!dlopen(BUILTINS, RTLD_NOW)) return 7;
#endif
  if (strstr(text, "CRASH")) abort();
  return strstr(text, "FAIL") != 0 ? 6 : 0;
}
const char* nvrtcGetErrorString(int result) { return "NVRTC_ERROR_COMPILATION"; }
int nvrtcGetProgramLogSize(void* program, size_t* size) { *size = 18; return 0; }
int nvrtcGetProgramLog(void* program, char* to) { strcpy(to, "one.cu(1): a word"); return 0; }
int nvrtcGetCUBINSize(void* program, size_t* size) { *size = strlen(text); return 0; }
int nvrtcGetCUBIN(void* program, char* to) { memcpy(to, text, strlen(text)); return 0; }
"""


def fake_driver(folder: Path) -> Path:
    """Build libcuda.so.1 in `folder`.

    It reads the environment variables FAKE_CUDA (CUDA's version, as 12090 for 12.9; 0: the query fails), FAKE_GPUS (the
    number of GPUs) and FAKE_MAJOR (the first GPU's major compute capability; default 8).
    """
    return _library(folder / "libcuda.so.1", DRIVER)


def empty_driver(folder: Path) -> Path:
    """Build a libcuda.so.1 without functions in `folder`."""
    return _library(folder / "libcuda.so.1", "")


def fake_nvrtc(path: Path, major: int, minor: int, *architectures: int, builtins: str | None = None) -> Path:
    """Build an NVRTC with this version and these architectures. Its compiler opens `builtins`, built next to it."""
    flags = [f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DARCHS={', '.join(map(str, architectures))}"]
    if builtins is not None:
        _library(path.with_name(builtins), "", f"-Wl,-soname,{builtins}")
        flags += [f'-DBUILTINS="{builtins}"', "-ldl"]
    return _library(path, NVRTC, *flags)


def headers(folder: Path) -> Path:
    """Create an empty cuda_fp16.h in `folder`, in place of CUDA's headers; return the folder."""
    folder.mkdir(parents=True)
    (folder / "cuda_fp16.h").write_text("")
    return folder


def _library(path: Path, text: str, *flags: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", *flags, "-o", path, source], check=True)
    return path
