"""Low-rank adapters of decode steps, for rows with different adapters and rows without one.

The results are compared with float64; those of one launch with those of a launch for each row or product, bit for bit.
"""

from __future__ import annotations

import ctypes

import pytest
import test_decode
from small import DLL, HALVES, ROUNDING, normal, poisoned, run, same_bits, torch

N_PRODUCTS = 3  # products with adapters, in a table
EPILOGUES = {"half": 0, "add": 2, "silu_times": 4}  # enum class Epilogue of csrc/cuda/ops.h
PRODUCT = 1  # the index of the computed product


def scratch(n, low_stride):
    """Scratch memory for A x of n rows, zero as it must be before the first launch."""
    DLL.qvlt_gpu_low_rank_scratch.restype = ctypes.c_uint64
    n_bytes = DLL.qvlt_gpu_low_rank_scratch(ctypes.c_int64(n), ctypes.c_int64(low_stride))
    return torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")


class Table:
    """An adapter's matrices of each product, and its table on the GPU: LowRankEntry of kernels/low_rank.h.

    `parts`: number of matrices whose rows the product interleaves, two for w1 and w2, each with its own update.
    """

    def __init__(self, half, rank, out, width, parts=1):
        self.half, self.matrices = half, []
        for product in range(N_PRODUCTS):
            product_rank = rank if product == PRODUCT else 8 * parts
            a = (normal(product_rank, width) / width**0.5).to(half)
            b = (normal(out, product_rank) / 8).to(half)
            # Each part has its ranks and, interleaved, its rows of B, which are zero at the ranks of other parts.
            for part in range(parts):
                other_ranks = (
                    torch.arange(product_rank, device="cuda") // max(product_rank // parts, 1) != part
                )
                b[part::parts, other_ranks] = 0
            self.matrices.append((a, b))
        words = []
        for a, b in self.matrices:
            words += [a.data_ptr(), b.data_ptr(), len(a) | parts << 32] if len(a) else [0, 0, 1 << 32]
        self.words = torch.tensor(words, dtype=torch.int64, device="cuda")

    def update(self, x):
        a, b = (each.double() for each in self.matrices[PRODUCT])
        return x.double() @ a.T @ b.T

    def bound(self, x):
        """Error of rounding A x to the compute type, and of sums in float32."""
        a, b = (each.double() for each in self.matrices[PRODUCT])
        rounding = (x.double() @ a.T).abs() * ROUNDING[self.half] @ b.abs().T
        return rounding * 1.02 + x.double().abs() @ a.abs().T @ b.abs().T * 2.0**-20 + 1e-6


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(("out", "width"), [(1, 8), (75, 72), (4096, 4096), (200, 11008)])
@pytest.mark.parametrize("epilogue", ["half", "add", "silu_times"])
def test_rows_of_several_adapters(half, out, width, epilogue):
    """Each epilogue, for rows with different adapters and without one, in one launch and in a launch for each row."""
    silu = epilogue == "silu_times"
    out += out % 2 if silu else 0
    parts = 2 if silu else 1
    tables = [Table(half, rank, out, width, parts) for rank in (0, 16, 48, 64, 208, 320)]
    n = 37
    row_tables = [tables[i % 7 - 1] if i % 7 else None for i in range(n)]
    x = normal(n, width + 8).to(half)
    x[:, width:] = float("nan")
    addresses = [0 if table is None else table.words.data_ptr() for table in row_tables]
    base = normal(n, out)

    def product(rows, ordered=True):
        y = poisoned(len(rows) + 1, out // parts, dtype=torch.float32 if epilogue == "add" else half)
        base_rows = base[rows].contiguous()
        if epilogue == "add":
            y[:-1], base_rows = base_rows, None
        low = poisoned(len(rows), 320, dtype=half)
        adapters = torch.tensor([addresses[i] for i in rows], dtype=torch.int64, device="cuda")
        order = None
        if ordered:
            adapters, indices = adapters.sort(descending=True)
            order = indices.int()
        x_rows = x[rows].contiguous()
        # Stride of x, inputs, rows, highest rank, memory for A x, scratch memory, stride of A x, outputs.
        sizes = (width + 8, width, len(rows), 320, low, scratch(len(rows), 320), 320, out)
        run("low_rank", half, adapters, order, PRODUCT, x_rows, *sizes, base_rows, EPILOGUES[epilogue], y)
        assert bool(y[-1].isnan().all())
        return y[:-1]

    y = product(list(range(n)))
    assert same_bits(product(list(range(n)), ordered=False), y)
    if epilogue != "add":
        # Rows without an adapter have the result of the base weight.
        finished = poisoned(n, out // parts, dtype=half)
        run("finish_raw", half, base, n, out, EPILOGUES[epilogue], finished)
        assert all(same_bits(y[i], finished[i]) for i in range(0, n, 7))
    for i, table in enumerate(row_tables):
        expected, bound = base[i].double(), 2.0**-20
        if table is not None:
            expected, bound = expected + table.update(x[i, :width]), table.bound(x[i, :width]) + 2.0**-20
        if silu:
            bound = bound + torch.zeros_like(expected)
            value, gate = expected[0::2], expected[1::2]
            bound = bound[0::2] * gate.abs() + bound[1::2] * value.abs() * 1.1 + 1e-5
            expected = value * gate * torch.sigmoid(gate)
        bound = bound + expected.abs() * ROUNDING[y.dtype] * 1.02 + 1e-6
        assert bool(((y[i].double() - expected).abs() <= bound).all()), i
        assert same_bits(product([i])[0], y[i])


@pytest.mark.parametrize("half", test_decode.HALVES)
@pytest.mark.parametrize("storage", test_decode.STORAGES)
@pytest.mark.parametrize(("out", "width"), [(40, 136), (4096, 4096), (258, 11008)])
def test_adapted_products(cuda_library, launch, half, storage, out, width):
    """A x and the product with the base weight have the same bits computed together and each alone."""
    dtype = test_decode.HALVES[half]
    matrix, _ = test_decode.random_matrix(cuda_library, launch, half, storage, out, width)
    tables = [Table(dtype, rank, out, width) for rank in (0, 16, 64, 208)]
    for n in (1, 7, 16, 41, 64):
        x = normal(n, width).to(dtype)
        tables_of = [tables[i % 5 - 1] if i % 5 else None for i in range(n)]
        addresses = [0 if table is None else table.words.data_ptr() for table in tables_of]
        adapters, indices = torch.tensor(addresses, dtype=torch.int64, device="cuda").sort(descending=True)
        order = indices.int()
        low_alone, low = (poisoned(n, 208, dtype=dtype) for _ in range(2))
        y, expected = (poisoned(n, out, dtype=torch.float32) for _ in range(2))
        stride = ctypes.c_int64(width)
        launch(
            *("decode_adapted", half, *matrix.shape, x, stride, n, test_decode.EPILOGUES.index("float"), y),
            *(adapters, order, PRODUCT, 208, low, scratch(n, 208), 208),
        )
        assert same_bits(y, matrix.product(x, "float", expected))
        sizes = (width, width, n, 208, low_alone, scratch(n, 208), 208, out)
        finished = poisoned(n, out, dtype=dtype)
        run("low_rank", dtype, adapters, order, PRODUCT, x, *sizes, y, EPILOGUES["half"], finished)
        assert same_bits(low, low_alone)
