"""Benchmark of the engine and other implementations on a CPU: milliseconds per layer of the 7B geometry.

Also measures the limits of the machine: memory bandwidth, and the throughput of the bfloat16 instruction of AVX-512 (0
on a CPU without it). adapters.py imports the language model from here.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy and 3 GB of memory; takes 4
minutes.
Run: python benchmarks/cpu_engine.py --paddle PYTHON --torch PYTHON --llama PYTHON, with interpreters that have:
  pip install -e '.[cpu]'                    for --paddle, the portable graph
  pip install torch                          for --torch
  pip install llama-cpp-python gguf numpy    for --llama

Weights are random; all layers of a run share the memory of one layer, so a layer must be larger than the CPU's caches
(with int4 it has 0.1 GB). Times are the best of many runs, since other load on the machine only adds time. The memory
bandwidth of a virtual machine varies with the load of others on the same host, so runs of the engine alternate with
runs of a bandwidth test.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "csrc"))

from engine import BFLOAT16, DTYPES, LANGUAGE, VISION, Engine, Library, Stored, make_config  # noqa: E402

# Layers of the language model; difference in blocks between the two timed vision models; tokens of the prompt, and
# tokens before a decode step; the last two as in cpu_peers.py.
LAYERS, VISION_LAYERS, PROMPT, PAST = 3, 2, 300, 300
GEOMETRY: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 64,  # the layers are timed, without lm_head
    "layer_norm_epsilon": 1e-6,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": VISION_LAYERS,
        "heads": 16,
        "mlp_ratio": 4.9231,  # an MLP width of 8192
    },
}


class Weights:
    """Random tensors: matrices in one storage type, others in bfloat16; cached, so that all layers share them."""

    def __init__(self, library: Library, dtype: int) -> None:
        self._library, self._dtype = library, dtype
        self._random = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
        self._cache: dict[tuple[str, tuple[int, ...], int], np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], matrix: bool) -> Stored:
        """Return a tensor; those that are not matrices are bfloat16."""
        dtype = self._dtype if matrix else BFLOAT16
        # The matrices of a layer have separate memory, even those of equal shape; the same matrix of the other layers
        # shares it, as the key contains only the last two components of the name, such as "c_attn.weight".
        key = (".".join(name.split(".")[-2:]) if matrix else "", shape, dtype)
        if key not in self._cache:
            values = np.resize(self._random, (shape[0], int(np.prod(shape[1:]))))
            self._cache[key] = self._library.pack(values, dtype)
        return self._cache[key], dtype, shape


def add_layer(weights: Weights, stored: dict[str, Stored], layer: str, hidden: int, mlp: int) -> None:
    """Add the tensors of a decoder layer to `stored`."""
    for norm in ("ln_1", "ln_2"):
        stored[f"{layer}.{norm}.weight"] = weights.get("", (hidden,), matrix=False)
    stored[f"{layer}.attn.c_attn.bias"] = weights.get("", (3 * hidden,), matrix=False)
    for name, shape in {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (mlp, hidden),
        "mlp.w2": (mlp, hidden),
        "mlp.c_proj": (hidden, mlp),
    }.items():
        stored[f"{layer}.{name}.weight"] = weights.get(f"{name}.weight", shape, matrix=True)


def language_engine(library: Library, dtype: int, threads: int = 0) -> Engine:
    weights, stored = Weights(library, dtype), {}
    hidden, mlp, vocab = 4096, 11008, GEOMETRY["vocab_size"]
    stored["wte.weight"] = weights.get("wte.weight", (vocab, hidden), matrix=False)
    stored["lm_head.weight"] = weights.get("lm_head.weight", (vocab, hidden), matrix=True)
    stored["ln_f.weight"] = weights.get("ln_f.weight", (hidden,), matrix=False)
    for i in range(LAYERS):
        add_layer(weights, stored, f"h.{i}", hidden, mlp)
    return Engine(library, make_config(GEOMETRY, LANGUAGE, n_threads=threads), stored)


def vision_engine(library: Library, dtype: int, layers: int, threads: int) -> Engine:
    weights, stored = Weights(library, dtype), {}
    geometry = {**GEOMETRY, "visual": {**GEOMETRY["visual"], "layers": layers}}
    config = make_config(geometry, VISION, n_threads=threads)
    width, mlp, hidden, patches, queries = 1664, config.vision_mlp_width, 4096, 1024, 256

    def bfloat16(name: str, *shape: int) -> None:
        stored[f"visual.{name}"] = weights.get(name, shape, matrix=False)

    def matrix(name: str, *shape: int) -> None:
        stored[f"visual.{name}"] = weights.get(name, shape, matrix=True)

    def norm(name: str, n: int) -> None:
        bfloat16(f"{name}.weight", n)
        bfloat16(f"{name}.bias", n)

    matrix("conv1.weight", width, 3, 14, 14)
    bfloat16("positional_embedding", patches, width)
    norm("ln_pre", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norm(f"{block}.ln_1", width)
        norm(f"{block}.ln_2", width)
        for name, n_out, n_in in (
            ("attn.in_proj", 3 * width, width),
            ("attn.out_proj", width, width),
            ("mlp.c_fc", mlp, width),
            ("mlp.c_proj", width, mlp),
        ):
            matrix(f"{block}.{name}.weight", n_out, n_in)
            bfloat16(f"{block}.{name}.bias", n_out)
    matrix("attn_pool.kv_proj.weight", hidden, width)
    norm("attn_pool.ln_kv", hidden)
    norm("attn_pool.ln_q", hidden)
    bfloat16("attn_pool.query", queries, hidden)
    bfloat16("attn_pool.pos_embed", queries, hidden)
    bfloat16("attn_pool.key_pos_embed", patches, hidden)
    matrix("attn_pool.attn.in_proj_weight", 3 * hidden, hidden)
    bfloat16("attn_pool.attn.in_proj_bias", 3 * hidden)
    matrix("attn_pool.attn.out_proj.weight", hidden, hidden)
    bfloat16("attn_pool.attn.out_proj.bias", hidden)
    norm("ln_post", hidden)
    matrix("proj", hidden, hidden)
    return Engine(library, config, stored)


def small_engine(library: Library, dtype: int, threads: int) -> Engine:
    """Engine with 5 million parameters, which fit in the CPU caches, to measure the overhead of a step."""
    hidden, layers, mlp, vocab = 256, 4, 704, 4000
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "kv_channels": 64}
    geometry = {**GEOMETRY, **sizes, "intermediate_size": 2 * mlp, "vocab_size": vocab}
    weights, stored = Weights(library, dtype), {}
    for name in ("wte", "lm_head"):
        stored[f"{name}.weight"] = weights.get(name, (vocab, hidden), name == "lm_head")
    stored["ln_f.weight"] = weights.get("", (hidden,), matrix=False)
    for i in range(layers):
        add_layer(weights, stored, f"h.{i}", hidden, mlp)
    return Engine(library, make_config(geometry, LANGUAGE, n_threads=threads), stored)


def elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def shortest(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Shortest time of each of several alternating runs, in seconds; `seconds` is the duration of all."""
    for run in runs.values():  # warm-up
        run()
    times = dict.fromkeys(runs, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            times[name] = min(times[name], elapsed(run))
    return times


def bytes_read(library: Library, dtype: int) -> int:
    """Bytes that a layer reads for one token: its weights, and keys and values of PAST tokens in bfloat16."""
    shapes = [(12288, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)]
    weights = sum(library.dll.qvl_packed_bytes(dtype, *shape) for shape in shapes)
    keys_and_values = 2 * PAST * 4096 * 2
    return weights + keys_and_values


# Operations of the matrix products: of a decoder layer for a prompt, and of a vision block for an image.
LAYER_FLOPS = 2 * PROMPT * (4 * 4096**2 + 3 * 4096 * 11008)
BLOCK_FLOPS = 2 * 1024 * (4 * 1664**2 + 2 * 1664 * 8192)


class Row(dict[str, float]):
    """Milliseconds per layer of an implementation, by kind of work: decode_1, decode_8, prefill, vision.

    decode_1 and decode_8 are decode steps of one and of eight sequences; vision is a block of the vision tower.
    """

    def __init__(self, name: str, figures: dict[str, float]) -> None:
        super().__init__(figures)
        self.name = name


def language_row(
    library: Library, name: str, threads: int, seconds: float, read_bandwidth: Callable[[], float]
) -> tuple[Row, float, float]:
    """Measure the engine with a storage type.

    Returns its times, the read rate of a decode step of one token, and the machine's read bandwidth, in bytes/s.

    Args:
        read_bandwidth: measures the machine's read bandwidth in bytes/s. Its calls alternate with the engine's runs;
            the best of their results is returned.
    """
    dtype = DTYPES[name]
    with (
        language_engine(library, dtype, threads) as engine,
        engine.pool(96, block_tokens=32, dtype=BFLOAT16) as pool,
    ):
        # Sequences below: new tokens, number of past tokens, length of the prompt, block table.
        block_tables = [list(range(10 * i, 10 * i + 10)) for i in range(8)]
        bandwidths: list[float] = []

        def decode_step(n: int) -> None:
            pool.forward([([1], PAST, PAST, block_tables[i]) for i in range(n)], logits=False)

        runs: dict[str, Callable[[], object]] = {
            "prefill": lambda: pool.forward([([1] * PROMPT, 0, PROMPT, block_tables[0])], logits=False),
            # Eight times in each round, since decode steps are much shorter than the prefill.
            **{f"decode_{n} {i}": functools.partial(decode_step, n) for i in range(8) for n in (1, 8)},
            "bandwidth": lambda: bandwidths.append(read_bandwidth()),
        }
        times = shortest(runs, 4 * seconds)  # for four figures: prefill, decode_1, decode_8, bandwidth
    figures = {"prefill": times["prefill"]}
    for kind in ("decode_1", "decode_8"):
        figures[kind] = min(run_seconds for run, run_seconds in times.items() if run.startswith(kind))
    row = Row(f"engine {name}", {kind: kind_seconds / LAYERS * 1e3 for kind, kind_seconds in figures.items()})
    return row, bytes_read(library, dtype) / (row["decode_1"] / 1e3), max(bandwidths)


def vision_row(library: Library, threads: int, seconds: float) -> tuple[Row, float]:
    """Measure the vision stage; return the milliseconds of a block, and those of patches and resampler together.

    The time of a block is the difference between two models with different numbers of blocks.
    """
    images = np.zeros([1, 3, 448, 448], np.float32)
    n_blocks = 1 + VISION_LAYERS
    with (
        vision_engine(library, BFLOAT16, 1, threads) as small,
        vision_engine(library, BFLOAT16, n_blocks, threads) as large,
    ):
        runs = {"small": lambda: small.encode_images(images), "large": lambda: large.encode_images(images)}
        times = shortest(runs, 4 * seconds)
    block = (times["large"] - times["small"]) / VISION_LAYERS
    return Row("engine bfloat16", {"vision": block * 1e3}), (times["small"] - block) * 1e3


def small_ms_per_token(library: Library, name: str, threads: int) -> float:
    """Milliseconds per token of the small model, greedy, 200 tokens."""
    with small_engine(library, DTYPES[name], threads) as engine:
        return (
            shortest({"completion": lambda: engine.generate([[1, 2, 3]], 200)}, 1)["completion"] / 200 * 1e3
        )


def peer_rows(kind: str, python: str, threads: int, seconds: float) -> list[Row]:
    """Measure other implementations in a process of their interpreter; no rows if that fails."""
    script = Path(__file__).with_name("cpu_peers.py")
    command = [python, str(script), kind, str(threads), str(seconds)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{kind} is omitted: {reason} (the docstring of {Path(__file__).name} lists what to install)\n")
        return []
    reports = [json.loads(line) for line in process.stdout.splitlines()]
    return [Row(report.pop("name"), report) for report in reports]


def print_table(rows: list[Row], flops: dict[str, float]) -> None:
    print(
        "| | decode 1, ms | decode 8, ms | throughput of 8 / of 1 | prefill 300, ms | GFLOP/s | vision, ms | GFLOP/s |"
    )
    print("| --- |" + " --- |" * 7)
    for row in rows:
        decode_1, decode_8 = row.get("decode_1"), row.get("decode_8")
        cells = [f"{decode_1:.2f}" if decode_1 else "", f"{decode_8:.2f}" if decode_8 else ""]
        cells.append(f"{8 * decode_1 / decode_8:.1f}" if decode_1 and decode_8 else "")
        for kind in ("prefill", "vision"):
            milliseconds = row.get(kind)
            if milliseconds:
                cells += [f"{milliseconds:.0f}", f"{flops[kind] / milliseconds / 1e6:.0f}"]
            else:
                cells += ["", ""]
        print(f"| {row.name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--seconds", type=float, default=2, help="time for each figure (default 2)")
    parser.add_argument(
        "--dtypes",
        default="bfloat16,int8,int4_g128,int4_g64",
        help="storage types of the engine, separated by commas",
    )
    parser.add_argument("--threads", type=int, default=0, help="default: the engine's choice")
    parser.add_argument("--paddle", metavar="PYTHON", default="", help="interpreter with this package")
    parser.add_argument("--torch", metavar="PYTHON", default="", help="interpreter with PyTorch")
    parser.add_argument(
        "--llama", metavar="PYTHON", default="", help="interpreter with llama-cpp-python, gguf and NumPy"
    )
    arguments = parser.parse_args()
    library, seconds, names = Library(arguments.library), arguments.seconds, arguments.dtypes.split(",")
    dll: Any = library.dll
    dll.qvlt_read_bandwidth.restype = dll.qvlt_bf16_peak.restype = ctypes.c_double
    dll.qvlt_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    with small_engine(library, BFLOAT16, arguments.threads) as engine:
        description = engine.describe()
    # The description is like "cpu avx512, 2 threads".
    threads = int(description.split(", ")[1].split()[0])
    print(f"{datetime.date.today()}: {description}; ms per layer\n")
    language = [
        # Read bandwidth: the best of six passes over 256 MiB.
        language_row(library, name, threads, seconds, lambda: dll.qvlt_read_bandwidth(threads, 1 << 28, 6))
        for name in names
    ]
    rows = [row for row, _, _ in language]
    vision, patches_and_resampler = vision_row(library, threads, seconds)
    for row in rows:  # that of bfloat16, if --dtypes has it: the vision stage is measured only in bfloat16
        if row.name == vision.name:
            row.update(vision)
    for kind, python in (
        ("paddle", arguments.paddle),
        ("torch", arguments.torch),
        ("llama", arguments.llama),
    ):
        if python:
            rows += peer_rows(kind, python, threads, seconds)
        else:
            print(f"{kind} is omitted: no --{kind}\n")
    print_table(rows, {"prefill": LAYER_FLOPS, "vision": BLOCK_FLOPS})
    print("\n| one token | reads, GB/s | read bandwidth, GB/s | share |\n| --- | --- | --- | --- |")
    for row, read_rate, bandwidth in language:
        print(f"| {row.name} | {read_rate / 1e9:.1f} | {bandwidth / 1e9:.1f} | {read_rate / bandwidth:.0%} |")
    print(f"\nbfloat16 instruction on registers: {dll.qvlt_bf16_peak(threads) / 1e9:.0f} GFLOP/s")
    print(f"patches and resampler: {patches_and_resampler:.0f} ms per image")
    print("\n| 5 million parameters, ms per token | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for n in sorted({1, threads}):
        cells = " | ".join(f"{small_ms_per_token(library, name, n):.3f}" for name in names)
        print(f"| {n} thread{'s' if n > 1 else ''} | {cells} |")


if __name__ == "__main__":
    main()
