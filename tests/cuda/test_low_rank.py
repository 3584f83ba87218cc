"""Low-rank adapters of decode rows against float64: rows with several adapters, and without one."""

from __future__ import annotations

import pytest
from small import HALVES, ROUNDING, normal, poisoned, run, same_bits, torch

PRODUCTS = 3
PRODUCT = 1  # the one that is computed


class Table:
    """An adapter's matrices of each product, and its table on the GPU: LowRankEntry of kernels/low_rank.h."""

    def __init__(self, half, rank, out, width, parts=1):
        self.half, self.parts = half, []
        for product in range(PRODUCTS):
            each = rank if product == PRODUCT else 8 * parts
            a, b = normal(each, width).to(half), (normal(out, each) / 8).to(half)
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
def test_rows_of_several_adapters(half, out, width):
    parts = 2 if out % 2 == 0 else 1
    tables = [Table(half, rank, out, width, parts) for rank in (0, 16, 48, 64, 208, 320)]
    n = 37
    chosen = [tables[i % 7 - 1] if i % 7 else None for i in range(n)]
    x = normal(n, width + 8).to(half)
    x[:, width:] = float("nan")
    addresses = [0 if table is None else table.words.data_ptr() for table in chosen]

    def update(rows, ordered=True):
        y = poisoned(len(rows) + 1, out, dtype=torch.float32)
        low = poisoned(len(rows), 320, dtype=half)
        adapters = torch.tensor([addresses[i] for i in rows], dtype=torch.int64, device="cuda")
        order = adapters.sort(descending=True).indices.int() if ordered else None
        picked = x[rows].contiguous()
        run("low_rank", half, adapters, order, PRODUCT, picked, width + 8, width, len(rows), low, 320, out, y)
        assert bool(y[-1].isnan().all())
        return y[:-1]

    got = update(list(range(n)))
    assert same_bits(update(list(range(n)), ordered=False), got)
    for i, table in enumerate(chosen):
        if table is None:
            assert not bool(got[i].any())
            continue
        missed = (got[i].double() - table.update(x[i, :width])).abs()
        assert bool((missed <= table.room(x[i, :width])).all()), i
        assert same_bits(update([i])[0], got[i])
