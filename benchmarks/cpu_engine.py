"""The engine on a CPU: milliseconds a layer of the 7B geometry, and the share of what the machine can do.

Build first: cmake -S csrc -B build/engine && cmake --build build/engine -j2. Needs NumPy, 3 GB of memory, a minute.
Run: python benchmarks/cpu_engine.py [--library build/engine/libqwenvl_testing.so] [--seconds 2]

Weights are random; all layers of a run share the memory of one, which no cache holds. Times are the best of many:
other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests" / "csrc"))

from engine import BFLOAT16, DTYPES, LANGUAGE, VISION, Engine, Library, Stored, make_config  # noqa: E402

LAYERS, VISION_LAYERS, PROMPT, PAST = 3, 2, 300, 300
GEOMETRY = {
    "hidden_size": 4096,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 64,  # the layers are timed; lm_head is left out
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
    """Matrices of any shape, cut from one block of random numbers and kept by shape."""

    def __init__(self, library: Library, dtype: int) -> None:
        self._library, self._dtype = library, dtype
        self._random = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
        self._made: dict[tuple[str, tuple[int, ...], int], np.ndarray] = {}

    def of(self, name: str, shape: tuple[int, ...], matrix: bool) -> Stored:
        dtype = self._dtype if matrix else BFLOAT16
        # One layer's matrices are memory of their own.
        key = (".".join(name.split(".")[-2:]) if matrix else "", shape, dtype)
        if key not in self._made:
            values = np.resize(self._random, (shape[0], int(np.prod(shape[1:]))))
            self._made[key] = self._library.pack(values, dtype)
        return self._made[key], dtype, shape


def language_engine(library: Library, dtype: int) -> Engine:
    weights, stored = Weights(library, dtype), {}
    hidden, mlp, vocab = 4096, 11008, GEOMETRY["vocab_size"]
    stored["wte.weight"] = weights.of("wte.weight", (vocab, hidden), False)
    stored["lm_head.weight"] = weights.of("lm_head.weight", (vocab, hidden), True)
    stored["ln_f.weight"] = weights.of("ln_f.weight", (hidden,), False)
    for i in range(LAYERS):
        for norm in ("ln_1", "ln_2"):
            stored[f"h.{i}.{norm}.weight"] = weights.of("", (hidden,), False)
        stored[f"h.{i}.attn.c_attn.bias"] = weights.of("", (3 * hidden,), False)
        for name, shape in {
            "attn.c_attn": (3 * hidden, hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.w1": (mlp, hidden),
            "mlp.w2": (mlp, hidden),
            "mlp.c_proj": (hidden, mlp),
        }.items():
            stored[f"h.{i}.{name}.weight"] = weights.of(f"{name}.weight", shape, True)
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


def best(run: Callable[[], object], seconds: float) -> float:
    """The shortest of as many runs as fit, in seconds."""
    run()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def matrix_bytes(library: Library, dtype: int) -> int:
    shapes = [(12288, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)]
    return sum(library.dll.qvl_packed_bytes(dtype, *shape) for shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=REPO / "build/engine/libqwenvl_testing.so")
    parser.add_argument("--seconds", type=float, default=2, help="for each figure (default 2)")
    parser.add_argument("--dtypes", default="bfloat16,int8,int4_g128,int4_g64")
    arguments = parser.parse_args()
    library, seconds = Library(arguments.library), arguments.seconds
    bandwidth = library.dll.qvlt_read_bandwidth
    bandwidth.restype, bandwidth.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    rows = []
    for name in arguments.dtypes.split(","):
        dtype = DTYPES[name]
        with language_engine(library, dtype) as engine, engine.pool(96, 32, BFLOAT16) as pool:
            describe = engine.describe()
            threads = int(describe.split(", ")[1].split()[0])
            tables = [list(range(10 * i, 10 * i + 10)) for i in range(8)]

            def step(n: int, pool=pool, tables=tables) -> None:
                pool.forward([([1], PAST, PAST, tables[i]) for i in range(n)], logits=False)

            def prefill(pool=pool, tables=tables) -> None:
                pool.forward([([1] * PROMPT, 0, PROMPT, tables[0])], logits=False)

            prefilled = best(prefill, seconds) / LAYERS
            one, eight = best(lambda: step(1), seconds) / LAYERS, best(lambda: step(8), seconds) / LAYERS
            read = bandwidth(threads, 1 << 28, 40)
        rate = matrix_bytes(library, dtype) / one
        flops = 2 * PROMPT * (3 * 4096**2 + 4096**2 + 3 * 4096 * 11008)
        rows.append(
            f"| {name} | {one * 1e3:.2f} | {rate / 1e9:.1f} | {read / 1e9:.1f} | {rate / read:.0%} "
            f"| {eight * 1e3:.2f} | {8 * one / eight:.1f} | {prefilled * 1e3:.0f} | {flops / prefilled / 1e9:.0f} |"
        )
    print(f"{describe}; ms a layer of the language model\n")
    print(
        "| weights | decode 1, ms | reads, GB/s | machine reads, GB/s | share | decode 8, ms | throughput, x "
        f"| prefill {PROMPT}, ms | GFLOP/s |"
    )
    print("| --- |" + " --- |" * 8)
    print("\n".join(rows))

    images = np.zeros([1, 3, 448, 448], np.float32)
    took = []
    for layers in (1, 1 + VISION_LAYERS):
        with vision_engine(library, BFLOAT16, layers) as engine:
            took.append(best(lambda engine=engine: engine.encode_images(images), 2 * seconds))
    layer = (took[1] - took[0]) / VISION_LAYERS
    flops = 2 * 1024 * (4 * 1664**2 + 2 * 1664 * 8192) + 4 * 1024**2 * 1664
    print(
        f"\nvision, bfloat16: {layer * 1e3:.0f} ms a layer ({flops / layer / 1e9:.0f} GFLOP/s), "
        f"{(took[0] - layer) * 1e3:.0f} ms for patches and resampler"
    )


if __name__ == "__main__":
    main()
