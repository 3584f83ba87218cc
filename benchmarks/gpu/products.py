"""Time the products of a decode step alone: `python benchmarks/gpu/products.py` prints a line per type and batch.

A chain is the products of 32 layers and of lm_head, one after another as in a step, without the kernels between them,
replayed as a CUDA graph. Then the mean time of each of a layer's products, 32 of the kind in a chain, and the bytes it
reads a second. Needs PyTorch for CUDA, and libqwenvl_cuda_test.so beside the kernels, in the folder
that QWENVL_CUDA_KERNELS names (tests/cuda/README.md).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import DEVICE, Sizes

# As enum class Storage of csrc/cuda/ops.h.
STORAGES = ("half", "int8", "int4_g64", "int4_g128")
STORAGES += ("uint4_g32", "uint4_g64", "uint4_g128", "uint8_g32", "uint8_g64")
INTOS = {"half": 0, "float": 1, "add": 2, "silu_times": 4}  # as enum class Into
REPLAYS = 7


class Matrix(NamedTuple):
    storage: str
    out: int
    width: int
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.values.nbytes + (self.scales.nbytes if self.storage != "half" else 0)


class Products:
    """The launchers of csrc/testing/cuda_decode.cc."""

    def __init__(self, folder: str) -> None:
        self.library = ctypes.CDLL(str(Path(folder) / "libqwenvl_cuda_test.so"))
        self.library.decode_linear.restype = ctypes.c_char_p

    def matrix(self, storage: str, out: int, width: int) -> Matrix:
        """Random matrix in the layout of the kernels."""
        sizes = ctypes.c_uint64(), ctypes.c_uint64()
        self.library.decode_matrix_bytes(STORAGES.index(storage), out, width, *map(ctypes.byref, sizes))
        values, scales = (torch.empty(size.value, dtype=torch.uint8, device=DEVICE) for size in sizes)
        if storage == "half":
            values.view(torch.bfloat16).normal_(std=0.02)
        else:
            values.random_(0, 256)
            self.fill_scales(storage, scales)
        return Matrix(storage, out, width, values, scales)

    @staticmethod
    def fill_scales(storage: str, scales: torch.Tensor) -> None:
        if storage.startswith("uint"):  # two scales, then two zero points, in bfloat16 plus an offset
            words = scales.view(torch.int16).view(-1, 4)
            words[:, :2] = torch.tensor(1e-3, dtype=torch.float16).view(torch.int16)
            zero = 128 + 8 if storage.startswith("uint4") else 0
            words[:, 2:] = torch.tensor(zero, dtype=torch.bfloat16).view(torch.int16)
        else:
            scales.view(torch.float32 if storage == "int8" else torch.bfloat16).fill_(1e-3)

    def launch(self, matrix: Matrix, x: torch.Tensor, into: str, y: torch.Tensor) -> None:
        """Y (+)= x W^T on the current stream. x bfloat16 [n, width]."""
        unit = 8 if matrix.storage == "half" else 128
        failed = self.library.decode_linear(
            *(0, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), STORAGES.index(matrix.storage)),
            *(matrix.out, matrix.width, -(-matrix.width // unit) * unit),
            *(ctypes.c_void_p(matrix.values.data_ptr()), ctypes.c_void_p(matrix.scales.data_ptr()), None),
            *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[1]), len(x), INTOS[into]),
            ctypes.c_void_p(y.data_ptr()),
        )
        if failed:
            raise SystemExit(failed.decode())


def milliseconds(body: Callable[[], None]) -> float:
    """Median time of a graph's replays."""
    body()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        body()
    taken = []
    for _ in range(REPLAYS + 2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        taken.append(events[0].elapsed_time(events[1]))
    return statistics.median(taken[2:])


Calls = dict[str, tuple[torch.Tensor, str, torch.Tensor]]  # x, into and y of a layer's product


class Layer(NamedTuple):
    c_attn: Matrix
    attn_proj: Matrix
    gate_up: Matrix
    mlp_proj: Matrix


def time_storage(products: Products, storage: str, batches: list[int], sizes: Sizes) -> None:
    hidden, mlp = sizes.hidden, sizes.mlp
    # As in exports: c_attn and lm_head have 8 bits when the others have 4; of a GPTQ or AWQ checkpoint, c_attn is
    # like the others and lm_head is not quantised.
    grouped = storage.startswith("uint")
    kept = storage if storage == "half" or grouped else "int8"
    layers = [
        Layer(
            products.matrix(kept, 3 * hidden, hidden),
            products.matrix(storage, hidden, hidden),
            products.matrix(storage, 2 * mlp, hidden),
            products.matrix(storage, hidden, mlp),
        )
        for _ in range(sizes.layers)
    ]
    head = products.matrix("half" if grouped else kept, sizes.vocab, hidden)
    total = head.bytes + sum(matrix.bytes for layer in layers for matrix in layer)
    for n in batches:
        x, wide, qkv = (
            torch.randn(n, width, device=DEVICE).bfloat16() for width in (hidden, mlp, 3 * hidden)
        )
        residual, logits = (torch.zeros(n, width, device=DEVICE) for width in (hidden, sizes.vocab))
        calls: Calls = {
            "c_attn": (x, "half", qkv),
            "attn_proj": (x, "add", residual),
            "gate_up": (x, "silu_times", wide),
            "mlp_proj": (wide, "add", residual),
        }

        took = milliseconds(partial(launch_all, products, layers, calls, (head, x, "float", logits)))
        said = [f"{storage}, {n} rows: {took:.3f} ms, {total / took / 1e9:.2f} TB/s"]
        for name, call in calls.items():
            each = milliseconds(partial(launch_all, products, layers, {name: call})) / sizes.layers
            said.append(f"{name} {1e3 * each:.1f} us, {getattr(layers[0], name).bytes / each / 1e9:.2f}")
        print("; ".join(said), flush=True)


def launch_all(products: Products, layers: list[Layer], calls: Calls, last: Any = None) -> None:
    for layer in layers:
        for name, (x, into, y) in calls.items():
            products.launch(getattr(layer, name), x, into, y)
    if last:
        products.launch(*last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=STORAGES, default=["half", "int8", "int4_g64"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    arguments = parser.parse_args()
    folder = os.environ.get("QWENVL_CUDA_KERNELS")
    if not folder:
        raise SystemExit("QWENVL_CUDA_KERNELS must name the folder of the kernels and libqwenvl_cuda_test.so")
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for storage in arguments.types:
            time_storage(Products(folder), storage, arguments.rows, Sizes())
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
