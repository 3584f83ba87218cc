"""Benchmark of the kernels in csrc/textbook at the sizes of the 7B geometry, compared with the memory bandwidth.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy and 1.5 GB of memory; takes 2
minutes.
Run: python benchmarks/textbook.py

All kernels run in one thread. Successive calls use different copies of the data, 512 MiB in total, so that no cache
contains them. The row "memory" only reads the same copies, in the best of three orders. Times are CPU time of the
calling thread, the best of many calls, since other load on the machine only adds time.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import math
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

COPIES_BYTES = 512 << 20
# Sizes of the attention: KEYS is the number of cached positions, BLOCK that of the positions in a block of the cache.
HEADS, HEAD_DIM, KEYS, BLOCK = 32, 128, 2000, 16
READ_ORDERS = 3  # of qvlt_read_memory in csrc/testing: one stream; four, in chunks of 16 or of 64 KiB


class Case(NamedTuple):
    """A kernel with its data.

    Attributes:
        run: function that runs a version of the kernel on a copy of the data.
        copies: the copies of the data.
        read_bytes: bytes that a call reads from a copy.
    """

    run: Callable[[int, np.ndarray], Any]
    copies: list[np.ndarray]
    read_bytes: int


def matvec(library: Library, isa: int, dtype: int, rows: int, columns: int) -> Case:
    random = np.random.default_rng(0)
    packed = library.pack(random.standard_normal((rows, columns)).astype(np.float32), dtype)
    x, y = random.standard_normal(columns).astype(np.float32), np.empty(rows, np.float32)

    def run(version: int, weights: np.ndarray) -> None:
        sizes = dtype, rows, columns
        library.dll.qvlt_textbook_matvec(isa, version, *sizes, pointer(x), pointer(weights), pointer(y))

    return Case(run, copies_of(packed), packed.nbytes)


def attention(library: Library, isa: int) -> Case:
    random = np.random.default_rng(0)
    n_blocks = math.ceil(KEYS / BLOCK)
    floats = random.standard_normal((n_blocks, 2, HEADS, BLOCK, HEAD_DIM)).astype(np.float32)
    cache = (floats.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, truncated
    q = (random.standard_normal((HEADS, HEAD_DIM)) * HEAD_DIM**-0.5).astype(np.float32)
    out = np.empty_like(q)

    def run(version: int, blocks: np.ndarray) -> None:
        sizes = HEADS, HEAD_DIM, KEYS, BLOCK
        library.dll.qvlt_textbook_attention(isa, version, *sizes, pointer(q), pointer(blocks), pointer(out))

    keys_and_values_bytes = 2 * KEYS * HEADS * HEAD_DIM * 2  # 2 bytes per value
    return Case(run, copies_of(cache.view(np.uint8).reshape(-1)), keys_and_values_bytes)


def copies_of(data: np.ndarray) -> list[np.ndarray]:
    copies = [aligned(data.nbytes) for _ in range(math.ceil(COPIES_BYTES / data.nbytes))]
    for copy in copies:
        copy[:] = data
    return copies


def best_times(
    runs: list[Callable[[np.ndarray], Any]], copies: list[np.ndarray], seconds: float
) -> list[float]:
    """Shortest CPU time of each run, in seconds; the runs alternate, so that other load slows all of them."""
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
    # Lines are like "model name\t: AMD EPYC"; those of the last CPU remain.
    values = dict(line.split("\t", 1) for line in lines if "\t" in line)
    if "model name" not in values:  # as on ARM
        return platform.processor() or platform.machine()
    name, family, model = (values[key].strip("\t: ") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--isa", choices=list(ISAS), default="best", help="instruction set of the kernels")
    parser.add_argument("--seconds", type=float, default=2, help="time for each figure (default 2)")
    arguments = parser.parse_args()
    library, isa = Library(arguments.library), ISAS[arguments.isa]
    dll: Any = library.dll
    dll.qvlt_read_memory.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    library.call("qvl_get_device_info", 0, 0, ctypes.byref(info))
    isa_name = info.isa.decode() if arguments.isa == "best" else arguments.isa
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{cpu_name()}, {os.cpu_count()} CPUs{load} at the start; {datetime.date.today()}; {isa_name}, one thread.\n"
    )

    print("| kernel | version | ms | GB/s | share of the memory bandwidth |\n| --- | --- | --- | --- | --- |")

    def print_rows(kernel: int, label: str, case: Case) -> None:
        """Measure all versions of a kernel, and the memory bandwidth at the same time."""
        versions: list[str] = []
        while name := dll.qvlt_textbook_name(kernel, len(versions)):
            versions.append(name.decode())
        n_bytes = case.copies[0].nbytes
        runs = [functools.partial(case.run, version) for version in range(len(versions))]
        reads = [
            lambda copy, order=order: dll.qvlt_read_memory(pointer(copy), n_bytes, order)
            for order in range(READ_ORDERS)
        ]
        times = best_times([*runs, *reads], case.copies, arguments.seconds)
        run_times, read_times = times[: len(runs)], times[len(runs) :]
        bandwidth = n_bytes / min(read_times)
        for version, seconds in zip([*versions, "memory"], [*run_times, case.read_bytes / bandwidth]):
            rate = case.read_bytes / seconds
            print(
                f"| {label} | {version} | {seconds * 1e3:.2f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} |",
                flush=True,
            )

    # (number of the kernel in csrc/textbook, label, storage type)
    for kernel, label, dtype in ((0, "bf16", BFLOAT16), (1, "int4", INT4_G128)):
        for columns in (4096, 11008):
            print_rows(kernel, f"{label}, 4096 x {columns}", matvec(library, isa, dtype, 4096, columns))
    print_rows(2, f"attention, {HEADS} x {HEAD_DIM}, {KEYS} keys", attention(library, isa))


if __name__ == "__main__":
    main()
