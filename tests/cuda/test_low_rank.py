"""Low-rank adapters of decode rows against float64: rows with several adapters, and without one."""

from __future__ import annotations

import ctypes

import pytest
import test_decode
from small import HALVES, ROUNDING, normal, poisoned, run, same_bits, torch

PRODUCTS = 3
INTOS = {"half": 0, "add": 2, "silu_times": 4}  # enum class Into of csrc/cuda/ops.h
PRODUCT = 1  # the one that is computed


class Table:
    """An adapter's matrices of each product, and its table on the GPU: LowRankEntry of kernels/low_rank.h."""

    def __init__(self, half, rank, out, width, parts=1):
        self.half, self.parts = half, []
        for product in range(PRODUCTS):
            each = rank if product == PRODUCT else 8 * parts
            a, b = (normal(each, width) / width**0.5).to(half), (normal(out, each) / 8).to(half)
            for part in range(parts):  # a row of B has the values of its own part alone
                others = torch.arange(each, device="cuda") // max(each // parts, 1) != part
                b[part::parts, others] = 0
            self.parts.append((a, b))
        words = []
        for a, b in self.parts:
            words += [a.data_ptr(), b.data_ptr(), len(a) | parts << 32] if len(a) else [0, 0, 1 << 32]
        self.words = torch.tensor(words, dtype=torch.int64, device="cuda")

    def update(self, x):
        a, b = (each.double() for each in self.parts[PRODUCT])
        return x.double() @ a.T @ b.T

    def room(self, x):
        """Error of rounding A x to the compute type, and of sums in float32."""
        a, b = (each.double() for each in self.parts[PRODUCT])
        rounding = (x.double() @ a.T).abs() * ROUNDING[self.half] @ b.abs().T
        return rounding * 1.02 + x.double().abs() @ a.abs().T @ b.abs().T * 2.0**-20 + 1e-6


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(("out", "width"), [(1, 8), (75, 72), (4096, 4096), (200, 11008)])
@pytest.mark.parametrize("into", ["half", "add", "silu_times"])
def test_rows_of_several_adapters(half, out, width, into):
    """Each epilogue, of rows of several adapters and of none, together and alone."""
    silu = into == "silu_times"
    out += out % 2 if silu else 0
    parts = 2 if silu else 1
    tables = [Table(half, rank, out, width, parts) for rank in (0, 16, 48, 64, 208, 320)]
    n = 37
    chosen = [tables[i % 7 - 1] if i % 7 else None for i in range(n)]
    x = normal(n, width + 8).to(half)
    x[:, width:] = float("nan")
    addresses = [0 if table is None else table.words.data_ptr() for table in chosen]
    base = normal(n, out)

    def product(rows, ordered=True):
        y = poisoned(len(rows) + 1, out // parts, dtype=torch.float32 if into == "add" else half)
        raw = base[rows].contiguous()
        if into == "add":
            y[:-1], raw = raw, None
        low = poisoned(len(rows), 320, dtype=half)
        adapters = torch.tensor([addresses[i] for i in rows], dtype=torch.int64, device="cuda")
        order = adapters.sort(descending=True).indices.int() if ordered else None
        picked = x[rows].contiguous()
        sizes = (width + 8, width, len(rows), low, 320, out)
        run("low_rank", half, adapters, order, PRODUCT, picked, *sizes, raw, INTOS[into], y)
        assert bool(y[-1].isnan().all())
        return y[:-1]

    got = product(list(range(n)))
    assert same_bits(product(list(range(n)), ordered=False), got)
    if into != "add":  # of rows without an adapter, what the product of the base weight gives
        finished = poisoned(n, out // parts, dtype=half)
        run("finish_raw", half, base, n, out, INTOS[into], finished)
        assert all(same_bits(got[i], finished[i]) for i in range(0, n, 7))
    for i, table in enumerate(chosen):
        wide, room = base[i].double(), 2.0**-20
        if table is not None:
            wide, room = wide + table.update(x[i, :width]), table.room(x[i, :width]) + 2.0**-20
        if silu:
            room = room + torch.zeros_like(wide)
            value, gate = wide[0::2], wide[1::2]
            room = room[0::2] * gate.abs() + room[1::2] * value.abs() * 1.1 + 1e-5
            wide = value * gate * torch.sigmoid(gate)
        room = room + wide.abs() * ROUNDING[got.dtype] * 1.02 + 1e-6
        assert bool(((got[i].double() - wide).abs() <= room).all()), i
        assert same_bits(product([i])[0], got[i])


@pytest.mark.parametrize("half", test_decode.HALVES)
@pytest.mark.parametrize("storage", test_decode.STORAGES)
@pytest.mark.parametrize(("out", "width"), [(40, 136), (4096, 4096), (258, 11008)])
def test_adapted_products(cuda_library, launch, half, storage, out, width):
    """A x beside the base product: the bits of both alone."""
    dtype = test_decode.HALVES[half]
    matrix, _ = test_decode.random_matrix(cuda_library, launch, half, storage, out, width)
    tables = [Table(dtype, rank, out, width) for rank in (0, 16, 64, 208)]
    for n in (1, 7, 16, 41, 64):
        x = normal(n, width).to(dtype)
        tables_of = [tables[i % 5 - 1] if i % 5 else None for i in range(n)]
        addresses = [0 if table is None else table.words.data_ptr() for table in tables_of]
        adapters = torch.tensor(addresses, dtype=torch.int64, device="cuda")
        order = adapters.sort(descending=True).indices.int()
        low_alone, low = (poisoned(n, 208, dtype=dtype) for _ in range(2))
        y, expected = (poisoned(n, out, dtype=torch.float32) for _ in range(2))
        stride = ctypes.c_int64(width)
        launch(
            *("decode_adapted", half, *matrix.shape, x, stride, n, test_decode.INTOS.index("float"), y),
            *(adapters, order, PRODUCT, low, 208),
        )
        assert same_bits(y, matrix.product(x, "float", expected))
        sizes = (width, width, n, low_alone, 208, out)
        finished = poisoned(n, out, dtype=dtype)
        run("low_rank", dtype, adapters, order, PRODUCT, x, *sizes, y, INTOS["half"], finished)
        assert same_bits(low, low_alone)
