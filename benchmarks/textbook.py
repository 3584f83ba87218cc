"""The versions in csrc/textbook at the sizes of the 7B geometry, one thread, beside the memory's bandwidth.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy, 1.5 GB of memory, 2 minutes.
Run: python benchmarks/textbook.py

Calls take turns with copies of the data, 512 MB together, so no cache holds it. "memory" only reads the same copies,
in the best of three orders. Times are CPU time of the calling thread, the best of many: other work on the machine only
ever adds.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "csrc"))

from engine import BFLOAT16, INT4_G128, ISAS, DeviceInfo, Library, aligned, pointer  # noqa: E402

IN_TURN = 512 << 20
HEADS, HEAD_DIM, KEYS, BLOCK = 32, 128, 2000, 16
WAYS_TO_READ = 3


class Measured(NamedTuple):
    """A kernel on data in memory: `run(version, copy)`, and what it reads."""

    run: Callable[[int, np.ndarray], Any]
    copies: list[np.ndarray]
    read_bytes: int  # of a copy


def matvec(library: Library, isa: int, dtype: int, rows: int, columns: int) -> Measured:
    random = np.random.default_rng(0)
    packed = library.pack(random.standard_normal((rows, columns)).astype(np.float32), dtype)
    x, y = random.standard_normal(columns).astype(np.float32), np.empty(rows, np.float32)

    def run(version: int, weights: np.ndarray) -> None:
        sizes = dtype, rows, columns
        library.dll.qvlt_textbook_matvec(isa, version, *sizes, pointer(x), pointer(weights), pointer(y))

    return Measured(run, copies_of(packed), packed.nbytes)


def attention(library: Library, isa: int) -> Measured:
    random = np.random.default_rng(0)
    shape = -(-KEYS // BLOCK), 2, HEADS, BLOCK, HEAD_DIM
    values = random.standard_normal(shape).astype(np.float32)
    cache = (values.view(np.uint32) >> 16).astype(np.uint16)
    q = (random.standard_normal((HEADS, HEAD_DIM)) * HEAD_DIM**-0.5).astype(np.float32)
    out = np.empty_like(q)

    def run(version: int, blocks: np.ndarray) -> None:
        sizes = HEADS, HEAD_DIM, KEYS, BLOCK
        library.dll.qvlt_textbook_attention(isa, version, *sizes, pointer(q), pointer(blocks), pointer(out))

    return Measured(run, copies_of(cache.view(np.uint8).reshape(-1)), KEYS * HEADS * HEAD_DIM * 2 * 2)


def copies_of(data: np.ndarray) -> list[np.ndarray]:
    copies = [aligned(data.nbytes) for _ in range(-(-IN_TURN // data.nbytes))]
    for copy in copies:
        copy[:] = data
    return copies


def best_times(
    runs: list[Callable[[np.ndarray], Any]], copies: list[np.ndarray], seconds: float
) -> list[float]:
    """Seconds of each; they take turns, so a busy moment meets all of them."""
    best, call = [float("inf")] * len(runs), 0
    end = time.monotonic() + seconds * len(runs)
    while time.monotonic() < end:
        for i, run in enumerate(runs):
            for _ in range(3):
                copy = copies[call % len(copies)]
                start = time.thread_time()
                run(copy)
                best[i] = min(best[i], time.thread_time() - start)
                call += 1
    return best


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = dict(line.split("\t", 1) for line in lines if "\t" in line)
    name, family, model = (found[key].strip("\t: ") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--isa", choices=list(ISAS), default="best")
    parser.add_argument("--seconds", type=float, default=2, help="for each figure (default 2)")
    arguments = parser.parse_args()
    library, isa = Library(arguments.library), ISAS[arguments.isa]
    dll: Any = library.dll
    dll.qvlt_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    library.call("qvl_get_device_info", 0, 0, ctypes.byref(info))
    name = info.isa.decode() if arguments.isa == "best" else arguments.isa
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{cpu_name()}, {os.cpu_count()} CPUs{load} at the start; {datetime.date.today()}; {name}, one thread.\n"
    )

    print("| kernel | version | ms | GB/s | of memory's |\n| --- | --- | --- | --- | --- |")

    def row(kernel: int, label: str, measured: Measured) -> None:
        names: list[str] = []
        while found := dll.qvlt_textbook_name(kernel, len(names)):
            names.append(found.decode())
        n_bytes = measured.copies[0].nbytes
        reads = [
            lambda copy, way=way: dll.qvlt_read_memory(pointer(copy), n_bytes, way)
            for way in range(WAYS_TO_READ)
        ]
        runs = [functools.partial(measured.run, version) for version in range(len(names))]
        *times, a, b, c = best_times([*runs, *reads], measured.copies, arguments.seconds)
        memory = n_bytes / min(a, b, c)
        for version, took in zip([*names, "memory"], [*times, measured.read_bytes / memory]):
            rate = measured.read_bytes / took
            print(
                f"| {label} | {version} | {took * 1e3:.2f} | {rate / 1e9:.1f} | {rate / memory:.0%} |",
                flush=True,
            )

    for kernel, title, dtype in ((0, "bf16", BFLOAT16), (1, "int4", INT4_G128)):
        for columns in (4096, 11008):
            row(kernel, f"{title}, 4096 x {columns}", matvec(library, isa, dtype, 4096, columns))
    row(2, f"attention, {HEADS} x {HEAD_DIM}, {KEYS} keys", attention(library, isa))


if __name__ == "__main__":
    main()
