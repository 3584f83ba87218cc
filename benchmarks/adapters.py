"""Benchmark of low-rank adapters on a CPU: decode steps and prompts with and without adapters, in the 7B geometry.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy and 1 GB of memory.
Run: python benchmarks/adapters.py

Three layers with random weights, as in cpu_engine.py; every adapter changes all five matrices of a layer. Times are the
best of many alternating runs. On a machine with other load, set OMP_NUM_THREADS=1 and --cpu_time.
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

# (outputs, inputs) of the matrices of a layer.
SHAPES = {
    "attn.c_attn": (12288, 4096),
    "attn.c_proj": (4096, 4096),
    "mlp.w1": (11008, 4096),
    "mlp.w2": (11008, 4096),
    "mlp.c_proj": (4096, 11008),
}
ADAPTER_DTYPES = ("float32", "float16", "bfloat16")
N_PROMPTS, PROMPT = 4, 100  # prompts of a batch, tokens of each
BLOCKS = 10  # of the KV cache per sequence, for 320 positions


def make_adapter(engine: Engine, rank: int, dtype: str, seed: int) -> Adapter:
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        floats = (random.standard_normal(shape) * 0.01).astype(np.float32)
        if dtype == "bfloat16":  # truncated to the upper 16 bits; NumPy has no bfloat16
            return (floats.view(np.uint32) >> 16).astype(np.uint16)
        return floats.astype(dtype)

    return engine.adapter(
        {
            f"h.{i}.{name}.weight": LowRank(values(rank, n_in), values(n_out, rank), scale=2.0)
            for i in range(LAYERS)
            for name, (n_out, n_in) in SHAPES.items()
        }
    )


def block_table(sequence: int) -> list[int]:
    return list(range(BLOCKS * sequence, BLOCKS * (sequence + 1)))


def decode_step(pool: Pool, adapters: list[Adapter | None]) -> Callable[[], object]:
    """Return a function that runs a decode step of a batch; `adapters` has an entry for each sequence."""
    # (tokens, n_past, prompt_len, block table)
    sequences = [([1], PAST, PAST, block_table(i)) for i in range(len(adapters))]
    return lambda: pool.forward(sequences, logits=False, adapters=adapters)


def prefill(pool: Pool, adapters: list[Adapter | None]) -> Callable[[], object]:
    """Return a function that computes a batch of prompts; `adapters` has an entry for each prompt."""
    # (tokens, n_past, prompt_len, block table)
    sequences = [([1] * PROMPT, 0, PROMPT, block_table(i)) for i in range(len(adapters))]
    return lambda: pool.forward(sequences, logits=False, adapters=adapters)


def shortest(
    runs: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Shortest time of each of several alternating runs, in seconds."""
    times = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = clock()
            run()
            times[name] = min(times[name], clock() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument(
        "--seconds", type=float, default=10, help="seconds of measurement for each storage type (default 10)"
    )
    parser.add_argument(
        "--dtypes", default="int4_g64", help="storage types of the base model, separated by commas"
    )
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU time; only for one thread")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--adapters", type=int, default=4, help="number of adapters (default 4)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of the decode step (default 16)")
    arguments = parser.parse_args()
    library = Library(arguments.library)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print("| base | adapters | decode step, ms per layer | overhead | prompts, ms per layer | overhead |")
    print("| --- |" + " --- |" * 5)
    for base in arguments.dtypes.split(","):
        with (
            language_engine(library, DTYPES[base]) as engine,
            engine.pool(512, block_tokens=32, dtype=BFLOAT16) as pool,
        ):
            runs = {
                "none": decode_step(pool, [None] * arguments.batch),
                "none, prompts": prefill(pool, [None] * N_PROMPTS),
            }
            for dtype in ADAPTER_DTYPES:
                adapters = [make_adapter(engine, arguments.rank, dtype, i) for i in range(arguments.adapters)]
                # The adapters are assigned to the sequences and to the prompts in turn.
                in_turn = [adapters[i % len(adapters)] for i in range(max(arguments.batch, N_PROMPTS))]
                runs[dtype] = decode_step(pool, in_turn[: arguments.batch])
                runs[f"{dtype}, prompts"] = prefill(pool, in_turn[:N_PROMPTS])
            times = shortest(runs, arguments.seconds, clock)
            for name in ("none", *ADAPTER_DTYPES):
                cells = [
                    f"{times[run] / LAYERS * 1e3:.2f} | {times[run] / times[baseline] - 1:+.0%}"
                    for run, baseline in ((name, "none"), (f"{name}, prompts", "none, prompts"))
                ]
                print(f"| {base} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
