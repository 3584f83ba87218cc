"""Benchmark of low-rank adapters on a CPU: a decode step and a prompt with and without them, at the 7B geometry.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy and 1 GB of memory.
Run: python benchmarks/adapters.py

Three layers with random weights, as in cpu_engine.py; every adapter changes all five matrices of a layer. Times are the
best of many alternating runs. On a machine in use: OMP_NUM_THREADS=1 and --cpu_time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cpu_engine import LAYERS, PAST, REPO, language_engine

sys.path.insert(0, str(REPO / "tests" / "csrc"))

from engine import BFLOAT16, DTYPES, Adapter, Engine, Library, LowRank, Pool

SHAPES = {
    "attn.c_attn": (12288, 4096),
    "attn.c_proj": (4096, 4096),
    "mlp.w1": (11008, 4096),
    "mlp.w2": (11008, 4096),
    "mlp.c_proj": (4096, 11008),
}
DTYPES_OF_ADAPTERS = ("float32", "float16", "bfloat16")


def make_adapter(engine: Engine, rank: int, dtype: str, seed: int) -> Adapter:
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        made = (random.standard_normal(shape) * 0.01).astype(np.float32)
        return (made.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else made.astype(dtype)

    return engine.adapter(
        {
            f"h.{i}.{name}.weight": LowRank(values(rank, into), values(out, rank), 2.0)
            for i in range(LAYERS)
            for name, (out, into) in SHAPES.items()
        }
    )


def step(pool: Pool, adapters: list[Adapter | None]) -> Callable[[], object]:
    """A decode step of a batch, each sequence with its adapter."""
    parts = [([1], PAST, PAST, list(range(10 * i, 10 * i + 10))) for i in range(len(adapters))]
    return lambda: pool.forward(parts, logits=False, adapters=adapters)


def prompts(pool: Pool, adapters: list[Adapter | None]) -> Callable[[], object]:
    """Prompts of 100 tokens in one pass."""
    parts = [([1] * 100, 0, 100, list(range(10 * i, 10 * i + 10))) for i in range(len(adapters))]
    return lambda: pool.forward(parts, logits=False, adapters=adapters)


def shortest(
    runs: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Shortest time of each of several alternating runs."""
    took = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = clock()
            run()
            took[name] = min(took[name], clock() - start)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--seconds", type=float, default=10, help="time for each table (default 10)")
    parser.add_argument("--dtypes", default="int4_g64", help="of the base")
    parser.add_argument("--cpu_time", action="store_true", help="the process's CPU time, for one thread")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    library = Library(arguments.library)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print("| base | adapters | decode step, ms per layer | over none | prompts, ms per layer | over none |")
    print("| --- |" + " --- |" * 5)
    for base in arguments.dtypes.split(","):
        with language_engine(library, DTYPES[base]) as engine, engine.pool(512, 32, BFLOAT16) as pool:
            runs = {
                "none": step(pool, [None] * arguments.batch),
                "none, prompts": prompts(pool, [None] * 4),
            }
            for dtype in DTYPES_OF_ADAPTERS:
                made = [make_adapter(engine, arguments.rank, dtype, i) for i in range(arguments.adapters)]
                mixed = [made[i % len(made)] for i in range(arguments.batch)]
                runs[dtype] = step(pool, mixed)
                runs[f"{dtype}, prompts"] = prompts(pool, mixed[:4])
            took = shortest(runs, arguments.seconds, clock)
            for name in ("none", *DTYPES_OF_ADAPTERS):
                cells = [
                    f"{took[part] / LAYERS * 1e3:.2f} | {took[part] / took[none] - 1:+.0%}"
                    for part, none in ((name, "none"), (f"{name}, prompts", "none, prompts"))
                ]
                print(f"| {base} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
