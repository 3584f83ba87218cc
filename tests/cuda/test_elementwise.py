"""Elementwise kernels. Compared with float64: RMS norm; rotation of q and k, with the write of k and v to the KV cache.

Gathering and embedding are compared bit for bit. The import of small.py skips these tests without PyTorch, a GPU or
libqwenvl_cuda_test.so.
"""

from __future__ import annotations

import numpy as np
import pytest
from small import HALVES, assert_close, normal, poisoned, run, same_bits, torch

EPSILON = 1e-6
# Number in qwenvl.h and PyTorch dtype of each cache type.
CACHES = {
    "float32": (0, torch.float32),
    "bfloat16": (1, torch.bfloat16),
    "float16": (5, torch.float16),
    "int8": (2, torch.int8),
}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.mark.parametrize("width", [1, 6, 100, 640, 1664, 4096, 5120, 4099, 8192, 20000])
@pytest.mark.parametrize("n", [1, 3, 70])
def test_rms_norm(half, n, width):
    x, weight = normal(n, width, scale=3), normal(width)
    y = poisoned(n + 1, width, dtype=half)
    run("rms_norm", half, x, weight, EPSILON, n, width, y)
    exact = x.double()
    expected = exact / (exact.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight.double()
    assert_close(y[:n], expected, tolerance=3e-6)
    assert bool(y[n].isnan().all())
    for row in {0, n // 2, n - 1}:
        alone = poisoned(1, width, dtype=half)
        run("rms_norm", half, x[row].clone(), weight, EPSILON, 1, width, alone)
        assert same_bits(alone[0], y[row])


@pytest.mark.parametrize("width", [1, 72, 4096, 4099, 11008])
def test_gather_columns(half, width):
    n, stride = 5, -(-width // 8) * 8
    x, order = normal(n, width + 3).to(half), torch.randperm(width, device="cuda").int()
    y = poisoned(n + 1, stride, dtype=half)
    run("gather_columns", half, x, width + 3, order, n, width, stride, y)
    assert torch.equal(y[:n, :width], x[:, order.long()])
    assert bool(y[:n, width:].isnan().all())
    assert bool(y[n].isnan().all())


@pytest.mark.parametrize("width", [1, 6, 640, 1664, 4096, 4099])
@pytest.mark.parametrize("with_images", [False, True])
def test_embed(half, width, with_images):
    vocab, n = 50, 9
    wte = normal(vocab, width).to(half)
    # The kernel clamps ids outside the vocabulary.
    ids = torch.tensor([0, 49, 7, 7, -3, 50, 2**30, 11, 12], dtype=torch.int32, device="cuda")
    expected = wte[ids.long().clamp(0, vocab - 1)].float()
    addresses = None
    if with_images:
        features = normal(3, width)
        # For each token, 1 + the row of image features in place of its embedding, or 0.
        feature = torch.tensor([0, 0, 1, 0, 0, 0, 3, 2, 0], device="cuda")
        addresses = torch.where(feature > 0, features.data_ptr() + (feature - 1) * width * 4, feature)
        expected = torch.where(feature[:, None] > 0, features[(feature - 1).clamp(0)], expected)
    x = poisoned(n + 1, width, dtype=torch.float32)
    run("embed", half, wte, vocab, width, ids, addresses, n, x)
    assert torch.equal(x[:n], expected)
    assert bool(x[n].isnan().all())


def scaled_for_int8(rows):
    """Rows float64 [..., head_dim] divided by their scales, before rounding to int8, and the scales [...]."""
    largest = rows.abs().amax(-1, keepdim=True)
    return rows * 127 / largest, (largest / 127)[..., 0]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "block_tokens"),
    [(32, 128, 16), (3, 128, 7), (2, 80, 256), (5, 6, 1), (3, 2, 5), (1, 256, 16), (2, 512, 3), (7, 90, 16)],
)
def test_rotate_and_store(half, cache, heads, head_dim, block_tokens):
    number, dtype = CACHES[cache]
    random = np.random.default_rng(heads * head_dim)
    sequences, max_positions, tables = 4, 40, 3
    max_blocks = -(-max_positions // block_tokens)
    # Random tokens of the sequences, in random order.
    chosen = random.permutation(sequences * max_positions)[: int(random.integers(30, 100))]
    sequence, position = chosen // max_positions, chosen % max_positions
    n = len(chosen)
    n_blocks = sequences * max_blocks + 3
    blocks = random.permutation(n_blocks)[: sequences * max_blocks].reshape(sequences, max_blocks)
    angle_table = random.integers(0, tables, n)
    size = torch.empty(0, dtype=dtype).element_size()
    n_values = 2 * heads * block_tokens * head_dim
    layer_bytes = n_values * size + (2 * heads * block_tokens * 4 if cache == "int8" else 0)
    block_bytes = (layer_bytes + 15) // 16 * 16 + 48  # blocks with gaps, which the kernel must not write
    pool = torch.full([n_blocks, block_bytes], 0x7D, dtype=torch.uint8, device="cuda")
    width = heads * head_dim
    qkv = normal(n, 3 * width).to(half)
    angle = normal(tables, max_positions, head_dim // 2) * 3
    cos, sin = angle.cos(), angle.sin()
    query_scale = torch.rand(max_positions, device="cuda") + 0.1
    positions, angle_tables, sequences_of, block_tables = (
        torch.tensor(array, dtype=torch.int32, device="cuda")
        for array in (position, angle_table, sequence, blocks)
    )
    q = poisoned(n + 1, width, dtype=half)

    def call(rows, pool, q):
        run(
            "rotate_and_store",
            half,
            *(qkv[rows].clone(), positions[rows].clone(), angle_tables[rows].clone()),
            *(sequences_of[rows].clone(), block_tables, max_blocks, cos, sin, query_scale, max_positions),
            *(pool, block_bytes, block_tokens, number, heads, head_dim, len(qkv[rows]), q),
        )

    call(slice(None), pool, q)
    parts = qkv.double().view(n, 3, heads, 2, head_dim // 2)
    row_cos = cos.double()[angle_table, position][:, None]
    row_sin = sin.double()[angle_table, position][:, None]

    def rotate(part, scale=1.0):
        a, b = part[:, :, 0], part[:, :, 1]
        both = [(a * row_cos - b * row_sin) * scale, (b * row_cos + a * row_sin) * scale]
        return torch.stack(both, 2).view(n, heads, head_dim)

    scale = query_scale.double()[position][:, None, None]
    assert_close(q[:n], rotate(parts[:, 0], scale).view(n, width), tolerance=1e-6)
    assert bool(q[n].isnan().all())
    # [n, 2, heads, head_dim]
    stored = torch.stack([rotate(parts[:, 1]), parts[:, 2].reshape(n, heads, head_dim)], 1)
    block, slot = blocks[sequence, position // block_tokens], position % block_tokens
    found = pool[:, : n_values * size].view(dtype).view(n_blocks, 2, heads, block_tokens, head_dim)
    found = found[block, :, :, slot]
    # A copy in which all values that the kernel must write are 0; the same is done with a fresh pool below.
    zeroed = pool.clone()
    view = zeroed[:, : n_values * size].view(dtype).view(n_blocks, 2, heads, block_tokens, head_dim)
    if cache == "int8":
        exact, scales = scaled_for_int8(stored)
        assert_close(found.float() - exact.float(), torch.zeros_like(exact), tolerance=0.5 + 1e-4)
        n_scales = 2 * heads * block_tokens * 4
        found_scales = pool[:, n_values : n_values + n_scales].view(torch.float32)
        found_scales = found_scales.view(n_blocks, 2, heads, block_tokens)[block, :, :, slot]
        assert bool(((found_scales.double() / scales - 1).abs() < 1e-6).all())
        scale_view = zeroed[:, n_values : n_values + n_scales].view(torch.float32)
        scale_view.view(n_blocks, 2, heads, block_tokens)[block, :, :, slot] = 0
        view[block, :, :, slot] = 0
    else:
        assert_close(found, stored, tolerance=1e-6)
        view[block, :, :, slot] = 0
    # The kernel wrote no other part of the pool.
    reference = torch.full_like(pool, 0x7D)
    view = reference[:, : n_values * size].view(dtype).view(n_blocks, 2, heads, block_tokens, head_dim)
    view[block, :, :, slot] = 0
    if cache == "int8":
        scale_view = reference[:, n_values : n_values + n_scales].view(torch.float32)
        scale_view.view(n_blocks, 2, heads, block_tokens)[block, :, :, slot] = 0
    assert torch.equal(zeroed, reference)
    # Each token alone gives the same bits.
    other = torch.full_like(pool, 0x7D)
    for row in range(n):
        alone = poisoned(1, width, dtype=half)
        call(slice(row, row + 1), other, alone)
        assert same_bits(alone[0], q[row])
    assert torch.equal(other, pool)


@pytest.mark.parametrize("value", [0.0, 1e-38, float("inf")])
def test_int8_without_a_scale(half, value):
    """A head whose largest magnitude is infinite or at most 1e-35 is stored as zeros with scale 0, as on the CPU."""
    heads, head_dim = 1, 64
    qkv = torch.zeros(1, 3 * head_dim, device="cuda", dtype=half)
    qkv[0, 2 * head_dim] = value
    pool = torch.full([2 * (head_dim + 4)], 0x7D, dtype=torch.uint8, device="cuda")
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    ones, zeros = torch.ones(32, device="cuda"), torch.zeros(32, device="cuda")
    q = poisoned(head_dim, dtype=half)
    run(
        "rotate_and_store",
        half,
        *(qkv, zero, zero, zero, zero, 1),  # position, angle table, sequence, block table, its length
        *(ones, zeros, ones, 1),  # cos, sin, query scale, number of positions
        *(pool, len(pool), 1, CACHES["int8"][0], heads, head_dim, 1, q),
    )
    assert pool.count_nonzero().item() == 0
