"""Benchmark of the engine on a CPU and its peers: milliseconds per layer of the 7B geometry, and the machine's limits.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy, 3 GB of memory, 4 minutes.
Run: python benchmarks/cpu_engine.py --paddle PYTHON --torch PYTHON --llama PYTHON, with interpreters that provide:
  pip install -e '.[cpu]'                    for --paddle, the portable graph
  pip install torch                          for --torch
  pip install llama-cpp-python gguf numpy    for --llama

Weights are random; all layers of a run share the memory of one layer, which exceeds every CPU cache. Times are the best
of many runs, since other load on the machine only adds time. The memory bandwidth of a virtual machine varies with its
neighbours, so reads by a bandwidth test alternate with the engine's.
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
        "mlp_ratio": 4.9231,
    },
}


class Weights:
    """Matrices of any shape, taken from one block of random numbers and cached by shape."""

    def __init__(self, library: Library, dtype: int) -> None:
        self._library, self._dtype = library, dtype
        self._random = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
        self._made: dict[tuple[str, tuple[int, ...], int], np.ndarray] = {}

    def of(self, name: str, shape: tuple[int, ...], matrix: bool) -> Stored:
        dtype = self._dtype if matrix else BFLOAT16
        # Each matrix of a layer has separate memory.
        key = (".".join(name.split(".")[-2:]) if matrix else "", shape, dtype)
        if key not in self._made:
            values = np.resize(self._random, (shape[0], int(np.prod(shape[1:]))))
            self._made[key] = self._library.pack(values, dtype)
        return self._made[key], dtype, shape


def layer_weights(weights: Weights, stored: dict[str, Stored], layer: str, hidden: int, mlp: int) -> None:
    for norm in ("ln_1", "ln_2"):
        stored[f"{layer}.{norm}.weight"] = weights.of("", (hidden,), False)
    stored[f"{layer}.attn.c_attn.bias"] = weights.of("", (3 * hidden,), False)
    for name, shape in {
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (mlp, hidden),
        "mlp.w2": (mlp, hidden),
        "mlp.c_proj": (hidden, mlp),
    }.items():
        stored[f"{layer}.{name}.weight"] = weights.of(f"{name}.weight", shape, True)


def language_engine(library: Library, dtype: int) -> Engine:
    weights, stored = Weights(library, dtype), {}
    hidden, mlp, vocab = 4096, 11008, GEOMETRY["vocab_size"]
    stored["wte.weight"] = weights.of("wte.weight", (vocab, hidden), False)
    stored["lm_head.weight"] = weights.of("lm_head.weight", (vocab, hidden), True)
    stored["ln_f.weight"] = weights.of("ln_f.weight", (hidden,), False)
    for i in range(LAYERS):
        layer_weights(weights, stored, f"h.{i}", hidden, mlp)
    return Engine(library, make_config(GEOMETRY, LANGUAGE), stored)


def vision_engine(library: Library, dtype: int, layers: int) -> Engine:
    weights, stored = Weights(library, dtype), {}
    geometry = {**GEOMETRY, "visual": {**GEOMETRY["visual"], "layers": layers}}
    config = make_config(geometry, VISION)
    width, mlp, hidden, patches, queries = 1664, config.vision_mlp_width, 4096, 1024, 256

    def table(name: str, *shape: int) -> None:
        stored[f"visual.{name}"] = weights.of(name, shape, False)

    def matrix(name: str, *shape: int) -> None:
        stored[f"visual.{name}"] = weights.of(name, shape, True)

    def norm(name: str, n: int) -> None:
        table(f"{name}.weight", n)
        table(f"{name}.bias", n)

    matrix("conv1.weight", width, 3, 14, 14)
    table("positional_embedding", patches, width)
    norm("ln_pre", width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        norm(f"{block}.ln_1", width)
        norm(f"{block}.ln_2", width)
        for name, out, into in (
            ("attn.in_proj", 3 * width, width),
            ("attn.out_proj", width, width),
            ("mlp.c_fc", mlp, width),
            ("mlp.c_proj", width, mlp),
        ):
            matrix(f"{block}.{name}.weight", out, into)
            table(f"{block}.{name}.bias", out)
    matrix("attn_pool.kv_proj.weight", hidden, width)
    norm("attn_pool.ln_kv", hidden)
    norm("attn_pool.ln_q", hidden)
    table("attn_pool.query", queries, hidden)
    table("attn_pool.pos_embed", queries, hidden)
    table("attn_pool.key_pos_embed", patches, hidden)
    matrix("attn_pool.attn.in_proj_weight", 3 * hidden, hidden)
    table("attn_pool.attn.in_proj_bias", 3 * hidden)
    matrix("attn_pool.attn.out_proj.weight", hidden, hidden)
    table("attn_pool.attn.out_proj.bias", hidden)
    norm("ln_post", hidden)
    matrix("proj", hidden, hidden)
    return Engine(library, config, stored)


def small_engine(library: Library, dtype: int, threads: int) -> Engine:
    """Engine with 5 million parameters, to measure the cost of a step besides reading weights."""
    hidden, layers, mlp, vocab = 256, 4, 704, 4000
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "kv_channels": 64}
    geometry = {**GEOMETRY, **sizes, "intermediate_size": 2 * mlp, "vocab_size": vocab}
    weights, stored = Weights(library, dtype), {}
    for name in ("wte", "lm_head"):
        stored[f"{name}.weight"] = weights.of(name, (vocab, hidden), name == "lm_head")
    stored["ln_f.weight"] = weights.of("", (hidden,), False)
    for i in range(layers):
        layer_weights(weights, stored, f"h.{i}", hidden, mlp)
    return Engine(library, make_config(geometry, LANGUAGE, n_threads=threads), stored)


def elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Shortest:
    """Shortest time of each of several alternating runs, in seconds."""

    def __init__(self, runs: Mapping[str, Callable[[], object]], seconds: float) -> None:
        for run in runs.values():
            run()
        self.of = dict.fromkeys(runs, float("inf"))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for name, run in runs.items():
                self.of[name] = min(self.of[name], elapsed(run))


def bytes_read(library: Library, dtype: int) -> int:
    """Bytes that a layer reads for one token: its weights, and keys and values of PAST tokens in bfloat16."""
    shapes = [(12288, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)]
    return sum(library.dll.qvl_packed_bytes(dtype, *shape) for shape in shapes) + 2 * PAST * 4096 * 2


LAYER_FLOPS = 2 * PROMPT * (4 * 4096**2 + 3 * 4096 * 11008)
BLOCK_FLOPS = 2 * 1024 * (4 * 1664**2 + 2 * 1664 * 8192)


class Row(dict[str, float]):
    """Milliseconds by part, of one implementation."""

    def __init__(self, name: str, figures: dict[str, float]) -> None:
        super().__init__(figures)
        self.name = name


def language_row(
    library: Library, name: str, seconds: float, reads: Callable[[], float]
) -> tuple[Row, float, float]:
    """The engine's times, the read rate of a decode step, and the machine's best read rate in the same period."""
    dtype = DTYPES[name]
    with language_engine(library, dtype) as engine, engine.pool(96, 32, BFLOAT16) as pool:
        tables = [list(range(10 * i, 10 * i + 10)) for i in range(8)]
        machine = [0.0]

        def step(n: int) -> None:
            pool.forward([([1], PAST, PAST, tables[i]) for i in range(n)], logits=False)

        def measure() -> None:
            machine[0] = max(machine[0], reads())

        runs: dict[str, Callable[[], object]] = {
            "prefill": lambda: pool.forward([([1] * PROMPT, 0, PROMPT, tables[0])], logits=False),
            **{f"decode_{n} {i}": functools.partial(step, n) for i in range(8) for n in (1, 8)},
            "machine": measure,
        }
        shortest = Shortest(runs, 4 * seconds).of
    figures = {"prefill": shortest["prefill"]}
    for part in ("decode_1", "decode_8"):
        figures[part] = min(took for run, took in shortest.items() if run.startswith(part))
    row = Row(f"engine {name}", {part: took / LAYERS * 1e3 for part, took in figures.items()})
    return row, bytes_read(library, dtype) / (row["decode_1"] / 1e3), machine[0]


def vision_row(library: Library, seconds: float) -> tuple[Row, float]:
    """Time of a vision block, and of the rest of the stage: patches and resampler."""
    images = np.zeros([1, 3, 448, 448], np.float32)
    few, more = 1, 1 + VISION_LAYERS
    with vision_engine(library, BFLOAT16, few) as a, vision_engine(library, BFLOAT16, more) as b:
        runs = {"few": lambda: a.encode_images(images), "more": lambda: b.encode_images(images)}
        shortest = Shortest(runs, 4 * seconds).of
    layer = (shortest["more"] - shortest["few"]) / VISION_LAYERS
    return Row("engine bfloat16", {"vision": layer * 1e3}), (shortest["few"] - layer) * 1e3


def small_row(library: Library, name: str, threads: int) -> float:
    """Milliseconds per token of the small model, greedy, 200 tokens."""
    with small_engine(library, DTYPES[name], threads) as engine:
        return Shortest({"all": lambda: engine.generate([[1, 2, 3]], 200)}, 1).of["all"] / 200 * 1e3


def peers(kind: str, python: str, threads: int, seconds: float) -> list[Row]:
    script = Path(__file__).with_name("cpu_peers.py")
    command = [python, str(script), kind, str(threads), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"{kind} is left out: {reason} (see the head of {Path(__file__).name} for what to install)\n")
        return []
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [Row(line.pop("name"), line) for line in lines]


def table(rows: list[Row], flops: dict[str, float]) -> None:
    print(
        "| | decode 1, ms | decode 8, ms | 8 over 1, x | prefill 300, ms | GFLOP/s | vision, ms | GFLOP/s |"
    )
    print("| --- |" + " --- |" * 7)
    for row in rows:
        one, eight = row.get("decode_1"), row.get("decode_8")
        cells = [f"{one:.2f}" if one else "", f"{eight:.2f}" if eight else ""]
        cells.append(f"{8 * one / eight:.1f}" if one and eight else "")
        for part in ("prefill", "vision"):
            took = row.get(part)
            cells += [f"{took:.0f}", f"{flops[part] / took / 1e6:.0f}"] if took else ["", ""]
        print(f"| {row.name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--seconds", type=float, default=2, help="time for each figure (default 2)")
    parser.add_argument("--dtypes", default="bfloat16,int8,int4_g128,int4_g64")
    parser.add_argument("--threads", type=int, default=0, help="default: the engine's choice")
    parser.add_argument("--paddle", metavar="PYTHON", default="", help="an interpreter with this package")
    parser.add_argument("--torch", metavar="PYTHON", default="", help="an interpreter with PyTorch")
    parser.add_argument(
        "--llama", metavar="PYTHON", default="", help="one with llama-cpp-python, gguf and NumPy"
    )
    arguments = parser.parse_args()
    library, seconds, names = Library(arguments.library), arguments.seconds, arguments.dtypes.split(",")
    dll: Any = library.dll
    dll.qvlt_read_bandwidth.restype = dll.qvlt_bf16_peak.restype = ctypes.c_double
    dll.qvlt_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    with small_engine(library, BFLOAT16, arguments.threads) as engine:
        describe = engine.describe()
    threads = int(describe.split(", ")[1].split()[0])
    print(f"{datetime.date.today()}: {describe}; ms per layer\n")
    language = [
        language_row(library, name, seconds, lambda: dll.qvlt_read_bandwidth(threads, 1 << 28, 6))
        for name in names
    ]
    rows = [row for row, _, _ in language]
    vision, around = vision_row(library, seconds)
    for row in rows:
        if row.name == vision.name:
            row.update(vision)
    for kind, python in (
        ("paddle", arguments.paddle),
        ("torch", arguments.torch),
        ("llama", arguments.llama),
    ):
        if python:
            rows += peers(kind, python, threads, seconds)
        else:
            print(f"{kind} is left out: --{kind} names no interpreter\n")
    table(rows, {"prefill": LAYER_FLOPS, "vision": BLOCK_FLOPS})
    print("\n| decode 1 | reads, GB/s | machine reads meanwhile, GB/s | share |\n| --- | --- | --- | --- |")
    for row, rate, machine in language:
        print(f"| {row.name} | {rate / 1e9:.1f} | {machine / 1e9:.1f} | {rate / machine:.0%} |")
    print(f"\nbfloat16 instruction on registers: {dll.qvlt_bf16_peak(threads) / 1e9:.0f} GFLOP/s")
    print(f"patches and resampler: {around:.0f} ms an image")
    print("\n| 5 million parameters, ms per token | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for n in sorted({1, threads}):
        took = " | ".join(f"{small_row(library, name, n):.3f}" for name in names)
        print(f"| {n} thread{'s' if n > 1 else ''} | {took} |")


if __name__ == "__main__":
    main()
