"""Products of prompts, compared with float64; all tiles of Hopper, and other rows of x, give the same bits."""

from __future__ import annotations

import pytest

prompt = pytest.importorskip("prompt", reason="the tests of prompts need a GPU")
import torch  # noqa: E402
from prompt import ADD, CHOSEN, FLOAT, GELU, HALF, HALVES, PORTABLE, SILU_TIMES, error_of, rows_of, run  # noqa: E402


def product(
    tile: int,
    epilogue: int,
    w: torch.Tensor,
    x: torch.Tensor,
    columns: int,
    bias: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product of `x` [n, x_stride] and `w` [out, stride], which have `columns` values per row.

    `tile`: index of a variant of the kernel for Hopper; CHOSEN, the one that linear_prompt chooses; or PORTABLE, the
    kernel for all GPUs, whose results may differ by rounding. `start`: y before the product is added to it.
    """
    out = w.shape[0] // 2 if epilogue == SILU_TIMES else w.shape[0]
    dtype = torch.float32 if epilogue in (FLOAT, ADD) else w.dtype
    y = torch.full((x.shape[0] + 1, out), float("nan"), dtype=dtype, device="cuda")
    if start is not None:
        y[:-1] = start
    run(
        "linear_prompt",
        w.dtype,
        *(tile, 0, w.shape[0], columns, w.stride(0), w, None, bias),  # 0: storage without quantization
        *(x, x.stride(0), x.shape[0], epilogue, y, None),
    )
    torch.cuda.synchronize()
    assert y[-1].isnan().all(), "the kernel wrote after the last row"
    return y[:-1]


def name_of(tile: int) -> str:
    """Name of a tile for messages; CHOSEN may be any tile."""
    return "CHOSEN" if tile == CHOSEN else prompt.DLL.qvlt_gpu_linear_prompt_tile_name(tile).decode()


def reference(
    epilogue: int, w: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, start: torch.Tensor | None
) -> torch.Tensor:
    y = x.double() @ w.double().T
    if bias is not None:
        y += bias.double()
    if epilogue == GELU:
        return y * 0.5 * (1 + torch.erf(y / 2**0.5))
    if epilogue == SILU_TIMES:
        return y[:, 0::2] * torch.nn.functional.silu(y[:, 1::2])
    return y if start is None else y + start.double()


# Rows, outputs, inputs.
SIZES = [
    (1, 8, 8),
    (5, 24, 56),
    (37, 100, 120),
    (130, 66, 1000),
    (284, 200, 72),
    (300, 1001, 264),
    (65, 4096, 136),
]


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("epilogue", [HALF, FLOAT, ADD, GELU, SILU_TIMES])
@pytest.mark.parametrize(("n", "out", "columns"), SIZES)
def test_every_tile_at_odd_sizes(half: torch.dtype, epilogue: int, n: int, out: int, columns: int) -> None:
    if epilogue == SILU_TIMES:
        out += out % 2
    w = torch.randn(out, columns, device="cuda").to(half)
    x = rows_of(torch.randn(n, columns, device="cuda").to(half), columns + 8)
    bias = torch.randn(out, device="cuda") if n % 2 else None
    start = torch.randn(n, out, device="cuda") if epilogue == ADD else None
    expected = reference(epilogue, w, x[:, :columns], bias, start)
    half_bound = 4e-3 if half == torch.bfloat16 else 5e-4
    bound = 1e-5 if epilogue in (FLOAT, ADD) else half_bound
    results = {}
    for tile in [CHOSEN, PORTABLE, *prompt.tiles()]:
        results[tile] = product(tile, epilogue, w, x, columns, bias, start)
        assert error_of(results[tile], expected) < bound, name_of(tile)
    for tile in prompt.tiles():
        assert torch.equal(results[tile], results[CHOSEN]), name_of(tile)


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_rows_of_x_end_before_those_of_w(half: torch.dtype) -> None:
    """Rows of W are longer and padded with zeros; the values after the end of a row of x are ignored."""
    w = torch.zeros(48, 128, device="cuda", dtype=half)
    w[:, :100] = torch.randn(48, 100, device="cuda").to(half)
    x = rows_of(torch.randn(9, 100, device="cuda").to(half), 104)
    expected = reference(FLOAT, w[:, :100], x[:, :100], None, None)
    for tile in [CHOSEN, PORTABLE, *prompt.tiles()]:
        assert error_of(product(tile, FLOAT, w, x, 100), expected) < 1e-5


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_row_does_not_depend_on_the_others(half: torch.dtype) -> None:
    w = torch.randn(1664, 1088, device="cuda").to(half)
    x = torch.randn(2000, 1088, device="cuda").to(half)
    for tile in (CHOSEN, PORTABLE):
        all_rows = product(tile, FLOAT, w, x, 1088)
        for first, n in [(0, 1), (1999, 1), (137, 284), (900, 1024), (3, 17), (500, 64)]:
            rows = slice(first, first + n)
            assert torch.equal(product(tile, FLOAT, w, x[rows], 1088), all_rows[rows])


def test_several_tiles_per_block() -> None:
    """More tiles than thread blocks at a time: except in the portable kernel, a block computes several.

    It uses the same ring of buffers for all of them.
    """
    w = torch.randn(8192, 328, device="cuda").to(torch.bfloat16)
    x = torch.randn(1500, 328, device="cuda").to(torch.bfloat16)
    expected = reference(FLOAT, w, x, None, None)
    for tile in [PORTABLE, *prompt.tiles()]:
        assert error_of(product(tile, FLOAT, w, x, 328), expected) < 1e-5


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_gelu(half: torch.dtype) -> None:
    """The error of GELU is at most the rounding error of the type, plus 5e-5 for the kernels' polynomial."""
    x = torch.linspace(-9, 9, 20000, device="cuda").to(half)[:, None].expand(-1, 8).contiguous()
    found = product(CHOSEN, GELU, torch.eye(8, device="cuda").to(half), x, 8).double()
    exact_x = x.double()
    expected = exact_x * torch.special.ndtr(exact_x)
    rounding = 2.0**-8 if half == torch.bfloat16 else 2.0**-11
    assert ((found - expected).abs() <= rounding * expected.abs() + 5e-5).all()


def packed(kind: str, integers: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [out, in] and scales [out] or [out, groups] in the layout of kernels/quantized.cuh.

    `out` is a multiple of 16, `in` of 128: tiles of 16 x 128 integers.
    """
    out, columns = integers.shape
    tiles, units = out // 16, columns // 128
    hopper = torch.cuda.get_device_capability() == (9, 0)
    if hopper:
        # In each 32 columns, a lane (thread of a warp) has pairs of columns that are 8 apart. The order of the results
        # below is [unit][tile] instead of [tile][unit]; a unit is 128 columns.
        integers = integers.reshape(out, -1, 4, 4, 2).transpose(2, 3).reshape(out, columns)
    if kind == "int8":
        parts = integers.reshape(tiles, 2, 8, units, 4, 4, 8)[..., [0, 2, 1, 3, 4, 6, 5, 7]]
        values = parts.permute(0, 3, 4, 2, 5, 1, 6).to(torch.int8)
        return (values.transpose(0, 1) if hopper else values).contiguous(), scales.float()
    # int4 values are stored with 8 added.
    parts = integers.reshape(tiles, 2, 8, units, 2, 2, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]] + 8
    nibbles = parts.permute(0, 3, 4, 2, 6, 1, 5, 7).to(torch.uint8)
    values = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    groups = scales.reshape(tiles, 2, 8, units, -1).permute(0, 3, 2, 4, 1).to(torch.bfloat16)
    if hopper:
        values, groups = values.transpose(0, 1), groups.transpose(0, 1)
    return values.contiguous(), groups.contiguous()


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(("storage", "kind", "group"), [(1, "int8", 0), (2, "int4", 64), (3, "int4", 128)])
@pytest.mark.parametrize(("n", "out", "columns"), [(3, 16, 128), (77, 30, 100), (284, 128, 640)])
def test_quantized_weights(
    half: torch.dtype, storage: int, kind: str, group: int, n: int, out: int, columns: int
) -> None:
    rows, stride = -(-out // 16) * 16, -(-columns // 128) * 128
    low, high = (-127, 128) if kind == "int8" else (-8, 8)
    integers = torch.randint(low, high, (rows, stride), device="cuda", dtype=torch.int32)
    integers[:, columns:] = 0
    scales = torch.rand((rows, stride // group) if group else (rows,), device="cuda") + 0.1
    scales = scales.to(torch.bfloat16) if group else scales
    exact_scales = scales.double().repeat_interleave(group, 1) if group else scales.double()[:, None]
    exact = integers.double() * exact_scales
    x = rows_of(torch.randn(n, columns, device="cuda").to(half), -(-columns // 8) * 8)
    expected = reference(FLOAT, exact[:out, :columns], x[:, :columns], None, None)
    values, packed_scales = packed(kind, integers, scales)
    scratch = torch.full((out, stride), float("nan"), dtype=half, device="cuda")
    y = torch.full((n, out), float("nan"), device="cuda")
    run(
        "linear_prompt",
        half,
        *(CHOSEN, storage, out, columns, stride, values, packed_scales, None),
        *(x, x.stride(0), n, FLOAT, y, scratch),
    )
    torch.cuda.synchronize()
    assert error_of(y, expected) < (4e-3 if half == torch.bfloat16 else 5e-4)
