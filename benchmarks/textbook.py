"""The versions in csrc/textbook at the sizes of the 7B geometry, one thread, beside the memory's bandwidth.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy, 1.5 GB of memory, 2 minutes.
Run: python benchmarks/textbook.py

Calls take turns with copies of the data, 512 MB together, so no cache holds it. Times are the best of many: other work
on the machine only ever adds. The bandwidth is the best of reads that take turns with the versions.
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
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "csrc"))

from engine import BFLOAT16, INT4_G128, ISAS, DeviceInfo, Library, aligned, pointer  # noqa: E402

IN_TURN = 512 << 20
HEADS, HEAD_DIM, KEYS, BLOCK = 32, 128, 2000, 16
Run = Callable[[int, int], None]  # (version, number of the call)


def matvec(library: Library, isa: int, dtype: int, rows: int, columns: int) -> tuple[Run, int]:
    """The product, and the bytes of weights and scales that it reads."""
    random = np.random.default_rng(0)
    packed = library.pack(random.standard_normal((rows, columns)).astype(np.float32), dtype)
    copies = [in_memory(packed) for _ in range(-(-IN_TURN // packed.nbytes))]
    x, y = random.standard_normal(columns).astype(np.float32), np.empty(rows, np.float32)

    def run(version: int, call: int) -> None:
        weights = pointer(copies[call % len(copies)])
        library.dll.qvlt_textbook_matvec(isa, version, dtype, rows, columns, pointer(x), weights, pointer(y))

    return run, packed.nbytes


def attention(library: Library, isa: int) -> tuple[Run, int]:
    random = np.random.default_rng(0)
    shape = -(-KEYS // BLOCK), 2, HEADS, BLOCK, HEAD_DIM
    values = random.standard_normal(shape).astype(np.float32)
    cache = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    copies = [in_memory(cache) for _ in range(-(-IN_TURN // cache.nbytes))]
    q = (random.standard_normal((HEADS, HEAD_DIM)) * HEAD_DIM**-0.5).astype(np.float32)
    out = np.empty_like(q)

    def run(version: int, call: int) -> None:
        blocks = pointer(copies[call % len(copies)])
        sizes = HEADS, HEAD_DIM, KEYS, BLOCK
        library.dll.qvlt_textbook_attention(isa, version, *sizes, pointer(q), blocks, pointer(out))

    return run, KEYS * HEADS * HEAD_DIM * 2 * 2


def in_memory(data: np.ndarray) -> np.ndarray:
    copy = aligned(data.nbytes)
    copy[:] = data
    return copy


def best_times(
    run: Run, versions: int, seconds: float, bandwidth: Callable[[], float]
) -> tuple[list[float], float]:
    """Seconds of each version and bytes per second of memory, in turns: a busy moment meets all of them."""
    best, most, call = [float("inf")] * versions, 0.0, 0
    end = time.monotonic() + seconds * versions
    while time.monotonic() < end:
        for version in range(versions):
            for _ in range(3):
                start = time.perf_counter()
                run(version, call)
                best[version] = min(best[version], time.perf_counter() - start)
                call += 1
        most = max(most, bandwidth())
    return best, most


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
    dll.qvlt_read_bandwidth.restype = ctypes.c_double
    dll.qvlt_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    info = DeviceInfo(size=ctypes.sizeof(DeviceInfo))
    library.call("qvl_get_device_info", 0, 0, ctypes.byref(info))
    name = info.isa.decode() if arguments.isa == "best" else arguments.isa
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{cpu_name()}, {os.cpu_count()} CPUs{load} at the start; {datetime.date.today()}; {name}, one thread.\n"
    )

    print("| kernel | version | ms | GB/s | of the bandwidth |\n| --- | --- | --- | --- | --- |")

    def row(kernel: int, label: str, run: Run, n_bytes: int) -> None:
        names: list[str] = []
        while found := dll.qvlt_textbook_name(kernel, len(names)):
            names.append(found.decode())
        read = functools.partial(dll.qvlt_read_bandwidth, 1, 1 << 27, 6)
        times, bandwidth = best_times(run, len(names), arguments.seconds, read)
        for version, took in zip(names, times):
            rate = n_bytes / took
            print(f"| {label} | {version} | {took * 1e3:.2f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} |")
        print(f"| {label} | memory | {n_bytes / bandwidth * 1e3:.2f} | {bandwidth / 1e9:.1f} | |", flush=True)

    for kernel, title, dtype in ((0, "bf16", BFLOAT16), (1, "int4", INT4_G128)):
        for columns in (4096, 11008):
            row(kernel, f"{title}, 4096 x {columns}", *matvec(library, isa, dtype, 4096, columns))
    row(2, f"attention, {HEADS} x {HEAD_DIM}, {KEYS} keys", *attention(library, isa))


if __name__ == "__main__":
    main()
