"""Kernels of the vision stage: layer norm, compared with float64; cut patches and added positions, bit for bit."""

from __future__ import annotations

import pytest
from small import HALVES, assert_close, normal, poisoned, run, same_bits, torch

EPSILON = 1e-6


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.mark.parametrize(("size", "patch", "stride"), [(448, 14, 592), (30, 5, 80), (6, 3, 27), (4, 1, 3)])
@pytest.mark.parametrize("n", [1, 3])
def test_cut_patches(half, n, size, patch, stride):
    images = normal(n, 3, size, size)
    grid = size // patch
    y = poisoned(n * grid * grid + 1, stride, dtype=half)
    run("cut_patches", half, images, n, size, patch, stride, y)
    patches = (
        images.view(n, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(n * grid * grid, -1)
    )
    assert torch.equal(y[:-1, : 3 * patch * patch], patches.to(half))
    assert y[:-1, 3 * patch * patch :].count_nonzero() == 0
    assert bool(y[-1].isnan().all())


@pytest.mark.parametrize("width", [1, 6, 100, 1664, 1030, 2048, 4096, 8192, 20000])
@pytest.mark.parametrize("n", [1, 3, 70])
@pytest.mark.parametrize("output", ["half", "float", "both", "in place", "added"])
def test_layer_norm(half, n, width, output):
    x, weight, bias = normal(n, width) + 20, normal(width), normal(width)
    original = x.clone()  # "in place" overwrites x
    add, period = (normal(4, width), 4) if output == "added" else (None, 0)
    y_half = None if output in ("float", "in place") else poisoned(n + 1, width, dtype=half)
    y_float = poisoned(n + 1, width, dtype=torch.float32) if output in ("float", "both", "added") else None
    if output == "in place":
        y_float = x
    run("layer_norm", half, x, weight, bias, EPSILON, n, width, add, period, y_half, y_float)
    exact = original.double()
    differences = exact - exact.mean(1, keepdim=True)
    expected = differences / (differences.square().mean(1, keepdim=True) + EPSILON).sqrt()
    tolerance = 5e-5  # rounding error of the mean of values near 20
    expected = expected * weight.double() + bias.double()
    if y_float is not None:
        assert_close(y_float[:n], expected, tolerance)
    if y_half is not None:
        rows = torch.arange(n, device="cuda") % max(period, 1)
        assert_close(y_half[:n], expected + (add[rows].double() if add is not None else 0), tolerance)
        assert bool(y_half[n].isnan().all())
    for row in {0, n // 2, n - 1}:
        if add is not None and row % period != 0:
            continue  # alone, the row would get another row of `add`
        alone = poisoned(1, width, dtype=half)
        alone_float = poisoned(1, width, dtype=torch.float32)
        x_row = original[row].clone()
        run("layer_norm", half, x_row, weight, bias, EPSILON, 1, width, add, period, alone, alone_float)
        assert y_half is None or same_bits(alone[0], y_half[row])
        assert y_float is None or same_bits(alone_float[0], y_float[row])


@pytest.mark.parametrize(
    ("n", "width", "period"), [(2048, 1664, 1024), (7, 6, 3), (5, 1, 2), (256, 4096, 256)]
)
def test_add_rows(half, n, width, period):
    x, add = normal(n + 1, width), normal(period, width)
    expected = x.clone()
    expected[:n] += add[torch.arange(n, device="cuda") % period]
    run("add_rows", half, x, add, n, width, period)
    assert torch.equal(x, expected)
