"""Benchmark of low-rank adapters on a GPU: decode steps of 16 sequences without adapters, with one, and with four.

    python benchmarks/gpu/adapters.py

The model has the 7B geometry and random weights. An adapter changes attn.c_attn, attn.c_proj, mlp.w1 and mlp.w2 of each
layer, like those of the official fine-tuning script, which have rank 64. Four adapters are assigned to the sequences in
turn. Needs PyTorch for CUDA, and the environment variables QWENVL_LIBRARY and QWENVL_CUDA_KERNELS of ours.py. Prints
lines of JSON.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from model import Sizes, language_shapes, random_ids
from ours import BLOCK, Ours, Steps
from timing import measure, note

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "csrc"))

from engine import BFLOAT16, Adapter, LowRank

BATCH, PAST = 16, 300
TARGETS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.w1.weight", "mlp.w2.weight")


def make_adapter(ours: Ours, rank: int, seed: int) -> Adapter:
    """Adapter of small random values; all matrices are views of one buffer, as large as the largest (c_attn's B)."""
    values = (np.random.default_rng(seed).standard_normal(rank * 12288) * 0.01).astype(np.float16)
    updates = {}
    for name, shape in language_shapes(ours.sizes).items():
        if name.endswith(TARGETS):
            n_out, n_in = shape
            a, b = values[: rank * n_in].reshape(rank, n_in), values[: n_out * rank].reshape(n_out, rank)
            updates[name] = LowRank(a, b, scale=0.25)
    return ours.engine.adapter(updates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--types", nargs="+", default=["bf16", "int4"], help="storage types of the base model"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64], help="of the adapters")
    arguments = parser.parse_args()
    for storage in arguments.types:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            time_adapters(storage, arguments.ranks)
        torch.cuda.empty_cache()


def time_adapters(storage: str, ranks: list[int]) -> None:
    ours = Ours(Sizes(), storage)
    n_blocks = BATCH * math.ceil((PAST + 1) / BLOCK)
    with ours.engine.pool(n_blocks, BLOCK, BFLOAT16) as pool:
        prompts = ours.batch(pool, n_blocks, BATCH, PAST + 1)
        prompts.run(
            random_ids(BATCH * PAST, ours.sizes), ours.tokens(BATCH), n_new=PAST, n_past=0, prompt_len=PAST
        )
        tokens = random_ids(BATCH, ours.sizes)

        def time_step(adapters: list[Adapter]) -> float:
            steps = Steps(ours.engine, pool, prompts.tables)
            for i, sequence in enumerate(steps.sequences):
                sequence.adapter = adapters[i % len(adapters)].handle.value if adapters else None
            run = functools.partial(steps.run, tokens, tokens, n_new=1, n_past=PAST, prompt_len=PAST)
            return measure(run, functools.partial(tokens.random_, 0, ours.sizes.vocab), group=8)

        without = time_step([])
        note(f"{storage}: a step of {BATCH} sequences without adapters: {without:.3f} ms")
        for rank in ranks:
            adapters = [make_adapter(ours, rank, seed) for seed in range(4)]
            for n in (1, 4):
                step = time_step(adapters[:n])
                note(f"{storage}: rank {rank}, {n} adapters: {step:.3f} ms ({step / without - 1:+.1%})")
            for adapter in adapters:
                ours.engine.library.dll.qvl_adapter_free(adapter.handle)


if __name__ == "__main__":
    main()
