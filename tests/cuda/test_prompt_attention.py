"""attention_prompt and attention_dense against float64; the same bits for any chunks of a prompt."""

from __future__ import annotations

import math
import random

import pytest

prompt = pytest.importorskip("prompt", reason="the tests of prompts need a GPU")
import torch  # noqa: E402
from prompt import HALVES, error_of, run  # noqa: E402

QUERY_TILE = 128
# Number in qwenvl.h and PyTorch dtype of each cache type.
CACHES = {
    "float32": (0, torch.float32),
    "bfloat16": (1, torch.bfloat16),
    "float16": (5, torch.float16),
    "int8": (2, torch.int8),
}


class Cache:
    """Pool of one layer with random keys and values, and their float64 values."""

    def __init__(self, kind: str, lengths: list[int], heads: int, head_dim: int, block_tokens: int) -> None:
        self.dtype, torch_dtype = CACHES[kind]
        self.heads, self.head_dim, self.block_tokens = heads, head_dim, block_tokens
        counts = [-(-length // block_tokens) for length in lengths]
        self.max_blocks = max(counts) + 1
        order = list(range(sum(counts) + 2))
        random.shuffle(order)
        shape = (len(order), 2, heads, block_tokens, head_dim)
        if torch_dtype == torch.int8:
            values = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
            scales = torch.rand(shape[:-1], device="cuda") * 0.02
            flat = torch.cat([values.flatten(1), scales.flatten(1).contiguous().view(torch.int8)], 1)
            real = values.double() * scales.double()[..., None]
        else:
            values = torch.randn(shape, device="cuda").to(torch_dtype)
            flat = values.flatten(1).view(torch.int8)
            real = values.double()
        # The distance of blocks is larger than their length.
        self.block_bytes = -(-flat.shape[1] // 16) * 16 + (64 if head_dim % 16 == 0 else 8)
        self.memory = torch.full((len(order), self.block_bytes), -1, dtype=torch.int8, device="cuda")
        self.memory[:, : flat.shape[1]] = flat
        self.tables = torch.full((len(lengths), self.max_blocks), 0x7FFFFFF, dtype=torch.int32)
        self.keys, self.values = [], []
        for i, (length, count) in enumerate(zip(lengths, counts)):
            mine = [order.pop() for _ in range(count)]
            self.tables[i, :count] = torch.tensor(mine, dtype=torch.int32)
            both = (
                real[mine]
                .permute(1, 2, 0, 3, 4)
                .reshape(2, heads, count * block_tokens, head_dim)[:, :, :length]
            )
            self.keys.append(both[0])
            self.values.append(both[1])
        self.tables = self.tables.cuda()

    def attention(
        self, q: torch.Tensor, chunks: list[tuple[int, int, int, int]], portable: bool
    ) -> torch.Tensor:
        """`chunks`: (first, n, past, table) of each prompt chunk."""
        tiles = [(i, offset) for i, chunk in enumerate(chunks) for offset in range(0, chunk[1], QUERY_TILE)]
        y = torch.full((q.shape[0] + 1, q.shape[1]), float("nan"), dtype=q.dtype, device="cuda")
        on_gpu = [torch.tensor(each, dtype=torch.int32, device="cuda") for each in (chunks, tiles)]
        run("attention_prompt", q.dtype, portable, q, *on_gpu, len(tiles), self.tables, self.max_blocks, self.memory,
            self.block_bytes, self.block_tokens, self.dtype, self.heads, self.head_dim, y)  # fmt: skip
        torch.cuda.synchronize()
        assert y[-1].isnan().all(), "written after the last query"
        return y[:-1]

    def reference(self, q: torch.Tensor, chunks: list[tuple[int, int, int, int]]) -> torch.Tensor:
        y = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
        for first, n, past, table in chunks:
            queries = q[first : first + n].double().reshape(n, self.heads, self.head_dim).transpose(0, 1)
            keys, values = self.keys[table][:, : past + n], self.values[table][:, : past + n]
            scores = queries @ keys.transpose(1, 2)
            seen = torch.ones(n, past + n, dtype=torch.bool, device="cuda").tril(past)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            y[first : first + n] = (weights @ values).transpose(0, 1).reshape(n, -1)
        return y


def bound(half: torch.dtype) -> float:
    return 8e-3 if half == torch.bfloat16 else 1e-3


# head_dim, block_tokens
SHAPES = [(128, 32), (128, 8), (8, 1), (16, 5), (42, 7), (64, 256), (64, 64), (90, 16), (200, 32), (256, 3)]


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("head_dim", "block_tokens"), SHAPES)
def test_prompts(half: torch.dtype, kind: str, head_dim: int, block_tokens: int) -> None:
    heads = 3
    cache = Cache(kind, [200, 1, 77, 330], heads, head_dim, block_tokens)
    chunks = [(0, 130, 70, 0), (130, 1, 0, 1), (131, 77, 0, 2), (208, 65, 265, 3)]
    q = (torch.randn(273, heads * head_dim, device="cuda") / head_dim**0.5).to(half)
    expected = cache.reference(q, chunks)
    for portable in (False, True):
        assert error_of(cache.attention(q, chunks, portable), expected) < bound(half)


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_prompt_cut_anywhere_is_the_same(half: torch.dtype, kind: str) -> None:
    heads, head_dim, length = 2, 128, 300
    cache = Cache(kind, [length], heads, head_dim, 32)
    q = (torch.randn(length, heads * head_dim, device="cuda") / head_dim**0.5 * 3).to(half)
    for portable in (False, True):
        whole = cache.attention(q, [(0, length, 0, 0)], portable)
        for _ in range(8):
            places = sorted(random.sample(range(1, length), 5))
            chunks = [(a, b - a, a, 0) for a, b in zip([0, *places], [*places, length])]
            assert torch.equal(cache.attention(q, chunks, portable), whole), places


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
    if queries == keys:  # query, key and value of a head side by side
        mixed = torch.randn(images, queries, heads, 3, head_dim, device="cuda").to(half)
        q, k, v = mixed.unbind(3)
        strides = [queries * 3 * width, 3 * width, 3 * head_dim] * 2
    else:  # the same queries for all images
        q = torch.randn(1, queries, heads, head_dim, device="cuda").to(half)
        k, v = torch.randn(2, images, keys, heads, head_dim, device="cuda").to(half)
        strides = [0, width, head_dim, keys * width, width, head_dim]
    each = [t.double().transpose(1, 2) for t in (q, k, v)]
    weights = (each[0] @ each[1].transpose(2, 3) * scale).softmax(-1)
    expected = (weights @ each[2]).transpose(1, 2).reshape(images * queries, width)
    last = images - 1
    for portable in (False, True):
        y = torch.full((images * queries + 1, width), float("nan"), dtype=half, device="cuda")
        shape = (queries, keys, heads, head_dim, scale)
        run("attention_dense", half, portable, q, k, v, *strides, images, *shape, y)
        torch.cuda.synchronize()
        assert y[-1].isnan().all(), "written after the last query"
        assert error_of(y[:-1], expected) < bound(half)
        alone = torch.full((queries, width), float("nan"), dtype=half, device="cuda")
        only = (q[min(last, q.shape[0] - 1)], k[last], v[last])
        run("attention_dense", half, portable, *only, *strides, 1, *shape, alone)
        torch.cuda.synchronize()
        assert torch.equal(alone, y[last * queries : -1])
