"""Benchmark of the matrix products of a decode step: `python benchmarks/gpu/products.py`.

Prints a line per storage type and batch, with times and read rates. The first time is that of a chain: the products of
32 layers and of lm_head in the order of a step, without the kernels between them, replayed as a CUDA graph. Each
further time is the mean time of one product, such as c_attn, in a chain of this product of all 32 layers.

Needs PyTorch for CUDA. The environment variable QWENVL_CUDA_KERNELS is the folder of the kernels and of
libqwenvl_cuda_test.so (tests/cuda/README.md).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import DEVICE, Sizes

# Names of the values of enum class Storage in csrc/cuda/ops.h, in order; half: 16-bit floats, of the compute type.
STORAGES = ("half", "int8", "int4_g64", "int4_g128")
STORAGES += ("uint4_g32", "uint4_g64", "uint4_g128", "uint8_g32", "uint8_g64")
COMPUTE = {
    "bfloat16": (0, torch.bfloat16),
    "float16": (1, torch.float16),
}  # the launchers' numbers and PyTorch's types
# The epilogues of the timed products: values of enum class Epilogue in csrc/cuda/ops.h.
EPILOGUES = {"half": 0, "float": 1, "add": 2, "silu_times": 4}
REPLAYS = 7  # timed, after two for warm-up


class Matrix(NamedTuple):
    """Matrix [n_out, n_in] in the layout of the kernels."""

    storage: str
    n_out: int
    n_in: int
    values: torch.Tensor
    scales: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes  # no scales for "half"


class Products:
    """The launchers of csrc/testing/cuda_decode.cc."""

    def __init__(self, folder: str, compute: str) -> None:
        self.library = ctypes.CDLL(str(Path(folder) / "libqwenvl_cuda_test.so"))
        self.library.decode_linear.restype = ctypes.c_char_p
        self.compute, self.dtype = COMPUTE[compute]

    def random_matrix(self, storage: str, n_out: int, n_in: int) -> Matrix:
        sizes = ctypes.c_uint64(), ctypes.c_uint64()
        self.library.decode_matrix_bytes(STORAGES.index(storage), n_out, n_in, *map(ctypes.byref, sizes))
        values, scales = (torch.empty(size.value, dtype=torch.uint8, device=DEVICE) for size in sizes)
        if storage == "half":
            values.view(self.dtype).normal_(std=0.02)
        else:
            values.random_(0, 256)
            self.fill_scales(storage, scales)
        return Matrix(storage, n_out, n_in, values, scales)

    def fill_scales(self, storage: str, scales: torch.Tensor) -> None:
        if storage.startswith("uint"):
            # Four 16-bit words for two rows: their scales in float16, and their zero points in the compute type, plus
            # kZeroBase4 or kZeroBase8 of csrc/cuda/kernels/quantized.cuh. The zero point here is 8, with 8 bits 128.
            words = scales.view(torch.int16).view(-1, 4)
            words[:, :2] = torch.tensor(1e-3, dtype=torch.float16).view(torch.int16)
            four_bits = storage.startswith("uint4")
            if self.dtype == torch.bfloat16:
                zero_point = 128 + 8 if four_bits else -128 + 128
            else:
                zero_point = 1024 + 8 if four_bits else 1024 + 128
            words[:, 2:] = torch.tensor(zero_point, dtype=self.dtype).view(torch.int16)
        else:
            scales.view(torch.float32 if storage == "int8" else torch.bfloat16).fill_(1e-3)

    def launch(self, matrix: Matrix, x: torch.Tensor, epilogue: str, y: torch.Tensor) -> None:
        """Enqueue y = x W^T, with an epilogue and no bias, on the current stream. x: [n, n_in] in the compute type."""
        unit = 8 if matrix.storage == "half" else 128  # rows are padded to a multiple of it
        padded = math.ceil(matrix.n_in / unit) * unit
        error = self.library.decode_linear(
            *(self.compute, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)),
            *(STORAGES.index(matrix.storage), matrix.n_out, matrix.n_in, padded),
            *(ctypes.c_void_p(matrix.values.data_ptr()), ctypes.c_void_p(matrix.scales.data_ptr()), None),
            *(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[1]), len(x), EPILOGUES[epilogue]),
            ctypes.c_void_p(y.data_ptr()),
        )
        if error:
            raise SystemExit(error.decode())


def graph_milliseconds(run: Callable[[], None]) -> float:
    """Median time of replays of a CUDA graph of `run`, in milliseconds."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    milliseconds = []
    for _ in range(REPLAYS + 2):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        milliseconds.append(start_event.elapsed_time(end_event))
    return statistics.median(milliseconds[2:])  # the first two are warm-up


Calls = dict[str, tuple[torch.Tensor, str, torch.Tensor]]
"""Arguments x, epilogue and y of `launch` for each product of a layer, by name."""


class Layer(NamedTuple):
    """Matrices of a layer."""

    c_attn: Matrix
    attn_proj: Matrix
    gate_up: Matrix
    mlp_proj: Matrix


def time_storage(products: Products, storage: str, batches: list[int], sizes: Sizes) -> None:
    hidden, mlp = sizes.hidden, sizes.mlp
    # As in exports: c_attn and lm_head have 8 bits if the other matrices have 4. In a GPTQ or AWQ checkpoint (uint
    # types), c_attn is like the other matrices, and lm_head is not quantized.
    has_zero_points = storage.startswith("uint")
    c_attn_storage = storage if storage == "half" or has_zero_points else "int8"
    head_storage = "half" if has_zero_points else c_attn_storage
    layers = [
        Layer(
            products.random_matrix(c_attn_storage, 3 * hidden, hidden),
            products.random_matrix(storage, hidden, hidden),
            products.random_matrix(storage, 2 * mlp, hidden),
            products.random_matrix(storage, hidden, mlp),
        )
        for _ in range(sizes.layers)
    ]
    head = products.random_matrix(head_storage, sizes.vocab, hidden)
    n_bytes = head.bytes + sum(matrix.bytes for layer in layers for matrix in layer)
    for n in batches:
        x, mlp_hidden, qkv = (
            torch.randn(n, width, device=DEVICE).to(products.dtype) for width in (hidden, mlp, 3 * hidden)
        )
        residual, logits = (torch.zeros(n, width, device=DEVICE) for width in (hidden, sizes.vocab))
        calls: Calls = {
            "c_attn": (x, "half", qkv),
            "attn_proj": (x, "add", residual),
            "gate_up": (x, "silu_times", mlp_hidden),
            "mlp_proj": (mlp_hidden, "add", residual),
        }
        chain_ms = graph_milliseconds(
            partial(launch_all, products, layers, calls, (head, x, "float", logits))
        )
        texts = [f"{storage}, {n} rows: {chain_ms:.3f} ms, {n_bytes / chain_ms / 1e9:.2f} TB/s"]
        for name, call in calls.items():
            product_ms = (
                graph_milliseconds(partial(launch_all, products, layers, {name: call})) / sizes.layers
            )
            rate = getattr(layers[0], name).bytes / product_ms / 1e9
            texts.append(f"{name} {1e3 * product_ms:.1f} us, {rate:.2f} TB/s")
        print("; ".join(texts), flush=True)


def launch_all(products: Products, layers: list[Layer], calls: Calls, head_call: Any = None) -> None:
    """Launch the products `calls` of every layer, then `head_call` (matrix, x, epilogue, y) if it is given."""
    for layer in layers:
        for name, (x, epilogue, y) in calls.items():
            products.launch(getattr(layer, name), x, epilogue, y)
    if head_call:
        products.launch(*head_call)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=STORAGES,
        default=["half", "int8", "int4_g64"],
        help="storage types of the weights",
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64], help="batch sizes")
    parser.add_argument("--compute", choices=COMPUTE, default="bfloat16", help="compute type")
    arguments = parser.parse_args()
    folder = os.environ.get("QWENVL_CUDA_KERNELS")
    if not folder:
        raise SystemExit("QWENVL_CUDA_KERNELS must name the folder of the kernels and libqwenvl_cuda_test.so")
    # A graph cannot be captured on the default stream.
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for storage in arguments.types:
            time_storage(Products(folder, arguments.compute), storage, arguments.rows, Sizes())
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
