"""Attention of prompts and of images, compared with float64; chunks of a prompt give the same bits as the prompt.

`portable` selects the kernels for any GPU even on Hopper, which has kernels of its own.
"""

from __future__ import annotations

import math
import random

import pytest

prompt = pytest.importorskip("prompt", reason="the tests of prompts need a GPU")
import torch  # noqa: E402
from prompt import HALVES, error_of, run  # noqa: E402

QUERY_TILE = 128  # kQueryTile of csrc/cuda/ops.h
# Number in qwenvl.h and PyTorch dtype of each cache type.
CACHES = {
    "float32": (0, torch.float32),
    "bfloat16": (1, torch.bfloat16),
    "float16": (5, torch.float16),
    "int8": (2, torch.int8),
}


class Cache:
    """The KV cache of one layer with random keys and values in scattered blocks, and copies of both in float64."""

    def __init__(self, kind: str, lengths: list[int], heads: int, head_dim: int, block_tokens: int) -> None:
        self.dtype, torch_dtype = CACHES[kind]
        self.heads, self.head_dim, self.block_tokens = heads, head_dim, block_tokens
        n_blocks = [-(-length // block_tokens) for length in lengths]
        self.max_blocks = max(n_blocks) + 1
        free_blocks = list(range(sum(n_blocks) + 2))
        random.shuffle(free_blocks)
        shape = (len(free_blocks), 2, heads, block_tokens, head_dim)
        if torch_dtype == torch.int8:
            values = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
            scales = torch.rand(shape[:-1], device="cuda") * 0.02
            flat = torch.cat([values.flatten(1), scales.flatten(1).contiguous().view(torch.int8)], 1)
            exact = values.double() * scales.double()[..., None]
        else:
            values = torch.randn(shape, device="cuda").to(torch_dtype)
            flat = values.flatten(1).view(torch.int8)
            exact = values.double()
        # Blocks have a stride larger than their length. For some head_dim it is not a multiple of 16 bytes: the kernel
        # then uses other loads.
        self.block_bytes = -(-flat.shape[1] // 16) * 16 + (64 if head_dim % 16 == 0 else 8)
        self.memory = torch.full((len(free_blocks), self.block_bytes), -1, dtype=torch.int8, device="cuda")
        self.memory[:, : flat.shape[1]] = flat
        # Entries without a block are far outside of the cache.
        self.tables = torch.full((len(lengths), self.max_blocks), 0x7FFFFFF, dtype=torch.int32)
        self.keys, self.values = [], []
        for i, (length, n) in enumerate(zip(lengths, n_blocks)):
            blocks = [free_blocks.pop() for _ in range(n)]
            self.tables[i, :n] = torch.tensor(blocks, dtype=torch.int32)
            tokens = exact[blocks].permute(1, 2, 0, 3, 4).reshape(2, heads, n * block_tokens, head_dim)
            keys, values = tokens[:, :, :length]
            self.keys.append(keys)
            self.values.append(values)
        self.tables = self.tables.cuda()

    def attention(
        self, q: torch.Tensor, chunks: list[tuple[int, int, int, int]], portable: bool
    ) -> torch.Tensor:
        """Run the kernel on chunks of prompts: (first row of q, tokens, earlier tokens, index of the block table)."""
        tiles = [(i, offset) for i, chunk in enumerate(chunks) for offset in range(0, chunk[1], QUERY_TILE)]
        y = torch.full((q.shape[0] + 1, q.shape[1]), float("nan"), dtype=q.dtype, device="cuda")
        gpu_chunks = torch.tensor(chunks, dtype=torch.int32, device="cuda")
        gpu_tiles = torch.tensor(tiles, dtype=torch.int32, device="cuda")
        run(
            "attention_prompt",
            q.dtype,
            *(portable, q, gpu_chunks, gpu_tiles, len(tiles), self.tables, self.max_blocks, self.memory),
            *(self.block_bytes, self.block_tokens, self.dtype, self.heads, self.head_dim, y),
        )
        torch.cuda.synchronize()
        assert y[-1].isnan().all(), "the kernel wrote after the last query"
        return y[:-1]

    def reference(self, q: torch.Tensor, chunks: list[tuple[int, int, int, int]]) -> torch.Tensor:
        y = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
        for first, n, n_past, table in chunks:
            queries = q[first : first + n].double().reshape(n, self.heads, self.head_dim).transpose(0, 1)
            keys, values = self.keys[table][:, : n_past + n], self.values[table][:, : n_past + n]
            scores = queries @ keys.transpose(1, 2)
            causal = torch.ones(n, n_past + n, dtype=torch.bool, device="cuda").tril(n_past)
            weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
            y[first : first + n] = (weights @ values).transpose(0, 1).reshape(n, -1)
        return y


def error_bound(half: torch.dtype) -> float:
    """Largest allowed relative error with this compute type."""
    return 8e-3 if half == torch.bfloat16 else 1e-3


# (head_dim, block_tokens)
SHAPES = [(128, 32), (128, 8), (8, 1), (16, 5), (42, 7), (64, 256), (64, 64), (90, 16), (200, 32), (256, 3)]


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("head_dim", "block_tokens"), SHAPES)
def test_prompts(half: torch.dtype, kind: str, head_dim: int, block_tokens: int) -> None:
    heads = 3
    cache = Cache(kind, [200, 1, 77, 330], heads, head_dim, block_tokens)
    # The first and the last chunk have earlier tokens of their prompts in the cache.
    chunks = [(0, 130, 70, 0), (130, 1, 0, 1), (131, 77, 0, 2), (208, 65, 265, 3)]
    q = (torch.randn(273, heads * head_dim, device="cuda") / head_dim**0.5).to(half)
    expected = cache.reference(q, chunks)
    for portable in (False, True):
        assert error_of(cache.attention(q, chunks, portable), expected) < error_bound(half)


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_prompt_cut_anywhere_is_the_same(half: torch.dtype, kind: str) -> None:
    heads, head_dim, length = 2, 128, 300
    cache = Cache(kind, [length], heads, head_dim, 32)
    q = (torch.randn(length, heads * head_dim, device="cuda") / head_dim**0.5 * 3).to(half)
    for portable in (False, True):
        in_one_chunk = cache.attention(q, [(0, length, 0, 0)], portable)
        for _ in range(8):
            starts = sorted(random.sample(range(1, length), 5))
            spans = zip([0, *starts], [*starts, length])
            chunks = [(start, end - start, start, 0) for start, end in spans]
            assert torch.equal(cache.attention(q, chunks, portable), in_one_chunk), starts


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize(
    ("images", "queries", "keys", "heads", "head_dim"),
    [
        (2, 1024, 1024, 3, 104),
        (1, 256, 1024, 4, 128),
        (3, 7, 5, 2, 8),
        (1, 65, 130, 3, 40),
        (2, 16, 16, 2, 64),
    ],
)
def test_images(half: torch.dtype, images: int, queries: int, keys: int, heads: int, head_dim: int) -> None:
    width = heads * head_dim
    scale = head_dim**-0.5
    if queries == keys:  # self-attention: query, key and value of a head are adjacent
        mixed = torch.randn(images, queries, heads, 3, head_dim, device="cuda").to(half)
        q, k, v = mixed.unbind(3)
        strides = [queries * 3 * width, 3 * width, 3 * head_dim] * 2
    else:  # cross-attention: the same queries for all images
        q = torch.randn(1, queries, heads, head_dim, device="cuda").to(half)
        k, v = torch.randn(2, images, keys, heads, head_dim, device="cuda").to(half)
        strides = [0, width, head_dim, keys * width, width, head_dim]
    exact_q, exact_k, exact_v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    weights = (exact_q @ exact_k.transpose(2, 3) * scale).softmax(-1)
    expected = (weights @ exact_v).transpose(1, 2).reshape(images * queries, width)
    last = images - 1
    for portable in (False, True):
        y = torch.full((images * queries + 1, width), float("nan"), dtype=half, device="cuda")
        shape = (queries, keys, heads, head_dim, scale)
        run("attention_dense", half, portable, q, k, v, *strides, images, *shape, y)
        torch.cuda.synchronize()
        assert y[-1].isnan().all(), "the kernel wrote after the last query"
        assert error_of(y[:-1], expected) < error_bound(half)
        # The last image alone has the same bits.
        alone = torch.full((queries, width), float("nan"), dtype=half, device="cuda")
        last_inputs = (q[min(last, q.shape[0] - 1)], k[last], v[last])
        run("attention_dense", half, portable, *last_inputs, *strides, 1, *shape, alone)
        torch.cuda.synchronize()
        assert torch.equal(alone, y[last * queries : -1])
