"""The CPU kernels (qvlt_*) of this processor's ISAs, also at odd sizes, against float64 loops (qvlr_*) or NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from engine import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    GROUPS,
    INT4_G64,
    INT4_G128,
    INT8,
    ISAS,
    QUANTIZED,
    UINT4,
    make_config,
    pointer,
)
from golden_model import GoldenModel

RANDOM = np.random.default_rng(5)
RANDOM_STATE = RANDOM.bit_generator.state


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_values_in_every_run():
    """Each test has the same values, whichever tests run before it."""
    RANDOM.bit_generator.state = RANDOM_STATE


def root_mean_square(values):
    return np.sqrt(np.mean(np.square(values, dtype=np.float64)))


def assert_close(values, expected, bound, size=None):
    """The largest difference, as a share of `size`, is within the bound.

    `size` is by default the root mean square of the expected values, which is too small for sums whose terms cancel.
    """
    assert np.isfinite(values).all()
    size = root_mean_square(expected) if size is None else size
    assert np.abs(values.astype(np.float64) - expected).max() <= bound * size


# Rows, columns: less than, multiples of and more than the sizes of SIMD vectors, units of 128 values, and tiles.
SHAPES = [(1, 1), (3, 7), (17, 16), (33, 129), (64, 588), (70, 512), (5, 1100), (130, 2100)]


def rounded_activations(x, isa, dtype):
    """Round activations [n, columns] to int8 and back, as the kernels for quantized weights do (quantized_x.h).

    A block is 8 SIMD vectors of bytes. A 32-bit lane of a vector has 4 values; the 32 values of the same lane in the 8
    vectors share a scale, 1/127 of their largest magnitude. With 4-bit weights the values are first put into the order
    of the nibbles (matvec_int4.h, matvec_groups.h).
    """
    lanes = {ISAS["generic"]: 4, ISAS["avx2"]: 8}.get(isa, 16)
    n, columns = x.shape
    block = 32 * lanes
    padded = np.zeros([n, -(-columns // block) * block], np.float32)
    padded[:, :columns] = x
    order = np.arange(padded.shape[1])
    if dtype in UINT4:
        # Axes: unit, byte of a word, nibble of a byte, vector, group of 8 words, half of the group, word.
        units = order.reshape(-1, 2, 2, 16 // lanes, lanes // 4, 2, 4)
        order = units.transpose(0, 3, 2, 4, 5, 1, 6).ravel()
    elif dtype in (INT4_G64, INT4_G128):  # of 64 values, i and 32 + i are in one byte
        order = order.reshape(-1, 2, 32).swapaxes(1, 2).ravel()
    blocks = padded[:, order].reshape(n, -1, 8, lanes, 4)  # rows, blocks, vectors, lanes, values
    largest = np.abs(blocks).max((2, 4), keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    # The generic ISA (4 lanes) has no fused multiply-add: its product is rounded to float32 before it is rounded to an
    # integer.
    product = np.multiply(blocks, inverse, dtype=np.float32 if lanes == 4 else np.float64)
    values = (np.rint(product) * (largest / np.float32(127))).astype(np.float32).reshape(padded.shape)
    padded[:, order] = values
    return np.ascontiguousarray(padded[:, :columns])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(library, isa, dtype, shape):
    """Products for tokens of prompts (blocked), of decode steps (matrix-vector kernels), and both in one call."""
    rows, columns = shape
    storage, threads = DTYPES[dtype], 2
    packed = library.pack(normal(rows, columns), storage)
    weights = library.unpack(packed, storage, rows, columns)
    bias = normal(rows)
    # Of n tokens, the first n_prompt belong to prompts, the others to decode steps.
    for n_prompt, n in [(0, 1), (0, 2), (0, 5), (0, 8), (0, 9), (0, 20), (1, 1), (9, 9), (50, 50), (3, 7)]:
        x, y = normal(n, columns), normal(n, rows)
        exact, add = y.copy(), n % 2  # exact: activations not rounded; add: add the product to y
        # Root mean square of the results if the signs of their terms were random.
        variances = np.square(x) @ np.square(weights).T + np.square(bias) + add * np.square(y)
        size = np.sqrt(variances.mean())
        library.dll.qvlr_linear(
            *(n, rows, columns, pointer(x), pointer(weights), pointer(bias), add, pointer(exact))
        )
        expected = y.copy()
        rounded_x = x.copy()
        if storage in QUANTIZED and n_prompt < n:
            rounded_x[n_prompt:] = rounded_activations(x[n_prompt:], isa, storage)
        library.dll.qvlr_linear(
            *(n, rows, columns, pointer(rounded_x), pointer(weights), pointer(bias), add, pointer(expected))
        )
        status = library.dll.qvlt_linear(
            *(isa, threads, storage, n_prompt, n, rows, columns),
            *(pointer(x), pointer(packed), None, pointer(bias), add, pointer(y)),
        )
        assert status == 0
        # float32 sums; in the blocked product, activations may be rounded to bfloat16.
        assert_close(y, expected, 2e-5 if n_prompt == 0 or storage == FLOAT32 else 2e-2, size)
        assert_close(y, exact, 3e-2, size)


@pytest.mark.parametrize("dtype", GROUPS)
def test_zero_points_and_order(library, isa, dtype):
    """Zero points 0 to n_levels, a row of scales 0, and permuted inputs, compared with NumPy in float64."""
    rows, columns, threads = 19, 715, 2
    group, n_levels = GROUPS[dtype], 16 if dtype in UINT4 else 256
    scales_shape = rows, -(-columns // group)
    integers = RANDOM.integers(0, n_levels, [rows, columns], np.uint8)
    scales = (RANDOM.standard_normal(scales_shape) / n_levels).astype(np.float16)
    scales[3] = 0
    zero_points = [0, 1, n_levels // 2, n_levels - 1, n_levels]
    zeros = RANDOM.choice(zero_points, scales_shape).astype(np.float16)
    packed = library.pack_groups(integers, scales, zeros, dtype)
    group_of_column = np.arange(columns) // group
    scale, zero = scales.astype(np.float64)[:, group_of_column], zeros.astype(np.float64)[:, group_of_column]
    weights = scale * (integers - zero)
    order = RANDOM.permutation(columns).astype(np.int32)
    for n_prompt, n in ((0, 1), (0, 3), (0, 8), (20, 20)):
        x, y = normal(n, columns) + 0.5, np.empty([n, rows], np.float32)
        permuted = x[:, order]
        rounded_x = permuted if n_prompt else rounded_activations(permuted, isa, dtype)
        arguments = isa, threads, dtype, n_prompt, n, rows, columns
        assert not library.dll.qvlt_linear(
            *arguments, pointer(x), pointer(packed), pointer(order), None, 0, pointer(y)
        )
        rounds_to_bfloat16 = n_prompt and isa == ISAS["avx512_bf16"]
        assert_close(y, rounded_x @ weights.T, 2e-2 if rounds_to_bfloat16 else 2e-5)
        assert_close(y, permuted @ weights.T, 3e-2)


def test_linear_of_a_row_does_not_depend_on_the_others(library, isa):
    """Bit for bit: a token of a prompt or of a decode step has the same product alone and in any batch."""
    columns = 1300
    for add, rows, storage in itertools.product((0, 1), (37, 200), DTYPES.values()):
        packed = library.pack(normal(rows, columns), storage)
        x, bias = normal(70, columns), normal(rows)

        def product(threads, n_prompt, x, add=add, rows=rows, storage=storage, packed=packed, bias=bias):
            y = np.full([len(x), rows], 0.3, np.float32)
            library.dll.qvlt_linear(
                *(isa, threads, storage, n_prompt, len(x), rows, columns),
                *(pointer(x), pointer(packed), None, pointer(bias), add, pointer(y)),
            )
            return y

        prompt = np.concatenate([product(1, 1, x[i : i + 1]) for i in range(len(x))])
        decode = np.concatenate([product(1, 0, x[i : i + 1]) for i in range(len(x))])
        for n in (2, 5, 8, 9, 16, 17, 40, 70):
            for threads in (1, 3):
                assert (product(threads, n, x[:n]) == prompt[:n]).all()
                assert (product(threads, 0, x[:n]) == decode[:n]).all()
                mixed = product(threads, n // 2, x[:n])
                assert (mixed[: n // 2] == prompt[: n // 2]).all()
                assert (mixed[n // 2 :] == decode[n // 2 : n]).all()


def test_every_float16(library, isa):
    """All finite values as weights, also subnormal values: their products with unit vectors are the weights.

    The blocked product may round them to bfloat16.
    """
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    weights = np.ascontiguousarray(values[np.isfinite(values)]).reshape(2048, 31)
    unit_vectors, products = np.eye(31, dtype=np.float32), np.empty([31, 2048], np.float32)
    for first in range(0, 31, 8):  # 8: tokens of one call of a matrix-vector kernel
        n = min(8, 31 - first)
        x, y = pointer(unit_vectors[first:]), pointer(products[first:])
        # Threads, storage type, tokens of prompts, all tokens, rows, columns.
        sizes = 1, FLOAT16, 0, n, 2048, 31
        assert library.dll.qvlt_linear(isa, *sizes, x, pointer(weights), None, None, 0, y) == 0
    expected = weights.T.astype(np.float32)
    assert (products == expected).all()
    x, y = pointer(unit_vectors), pointer(products)  # the blocked product
    sizes = 2, FLOAT16, 31, 31, 2048, 31
    assert library.dll.qvlt_linear(isa, *sizes, x, pointer(weights), None, None, 0, y) == 0
    rounds_to_bfloat16 = isa == ISAS["avx512_bf16"]
    np.testing.assert_allclose(products, expected, rtol=2**-8 if rounds_to_bfloat16 else 0, atol=0)


@pytest.mark.parametrize("width", [1, 5, 16, 33, 104, 1664])
def test_norms(library, isa, width):
    x, weight, bias = normal(3, width) * 4 + 1, normal(width), normal(width)
    result, expected = np.empty_like(x), np.empty_like(x)
    epsilon = 1e-6
    library.dll.qvlt_rms_norm(isa, 3, width, pointer(x), pointer(weight), epsilon, pointer(result))
    library.dll.qvlr_rms_norm(3, width, pointer(x), pointer(weight), epsilon, pointer(expected))
    assert_close(result, expected, 3e-6)
    arguments = pointer(x), pointer(weight), pointer(bias), epsilon
    library.dll.qvlt_layer_norm(isa, 3, width, *arguments, pointer(result))
    library.dll.qvlr_layer_norm(3, width, *arguments, pointer(expected))
    if width > 1:  # a single value differs from its mean only by rounding errors, which are not comparable
        assert_close(result, expected, 2e-5)


def test_activations(library, isa):
    x = np.concatenate([normal(1003) * 4, np.array([0, -0.0, 90, -90, 1e30, -1e30], np.float32)])
    result, expected = x.copy(), x.copy()
    library.dll.qvlt_gelu(isa, len(x), pointer(result))
    library.dll.qvlr_gelu(len(x), pointer(expected))
    np.testing.assert_allclose(result, expected, rtol=3e-6, atol=5e-7)
    gate = np.roll(x, 3)
    result, expected = x.clip(-1e4, 1e4), x.clip(-1e4, 1e4)
    library.dll.qvlt_silu_mul(isa, len(x), pointer(gate), pointer(result))
    library.dll.qvlr_silu_mul(len(x), pointer(gate), pointer(expected))
    np.testing.assert_allclose(result, expected, rtol=3e-6, atol=1e-30)
    result = x.copy()
    library.dll.qvlt_add(isa, len(x), pointer(gate), pointer(result))
    assert (result == x + gate).all()


def test_bfloat16(library, isa):
    """Conversion of float32 to bfloat16, rounded to nearest even, and back."""
    # Consecutive bfloat16 values above 1; the same plus half their distance (a tie), a little less and a little more
    # than that; the negatives of the bfloat16 values.
    exact = np.arange(1, 300, dtype=np.uint32) * 0x10000 + 0x3F800000
    bits = np.concatenate([exact, exact + 0x8000, exact + 0x7FFF, exact + 0x8001, exact ^ 0x80000000])
    x = bits.astype(np.uint32).view(np.float32)
    rounded, float32 = np.empty(len(x), np.uint16), np.empty_like(x)
    library.dll.qvlt_bfloat16(isa, len(x), pointer(x), pointer(rounded), pointer(float32))
    truncated = (x.view(np.uint32) >> 16).astype(np.uint32)
    remainder = x.view(np.uint32) & 0xFFFF
    expected = truncated + ((remainder > 0x8000) | ((remainder == 0x8000) & (truncated % 2 == 1)))
    assert (rounded == expected).all()
    assert (float32.view(np.uint32) == rounded.astype(np.uint32) << 16).all()


def rotary_by_formula(config, prompt_len):
    """Rotary frequencies in double precision, with dynamic NTK.

    The base is multiplied by alpha^(dim / (dim - 2)). Alpha is 2^ceil(log2(prompt_len / seq_length) + 1) - 1, but at
    least 1.
    """
    ratio = prompt_len / config.seq_length
    alpha = max(1, 2 ** math.ceil(math.log2(ratio) + 1) - 1)
    dim = config.head_dim
    base = config.rotary_base * alpha ** (dim / (dim - 2))
    return base ** (-np.arange(0, dim, 2) / dim)


@pytest.mark.parametrize("prompt_len", [1, 511, 512, 513, 700, 1025, 4000])
def test_rotary(library, isa, prompt_len):
    config = make_config(GoldenModel("b").config)
    positions = np.array([0, 1, 299, 512, 699, 4095], np.int32)
    n, dim = len(positions), config.head_dim
    scale, x = normal(n), normal(n, dim)
    expected, frequencies = x.copy(), np.empty(dim // 2, np.float32)
    arguments = prompt_len, n, pointer(positions), pointer(scale), pointer(frequencies), pointer(x)
    library.dll.qvlt_rotary(isa, config, *arguments)
    np.testing.assert_allclose(frequencies, rotary_by_formula(config, prompt_len), rtol=1e-6)
    library.dll.qvlr_rotary(
        n, dim, pointer(positions), pointer(frequencies), pointer(scale), pointer(expected)
    )
    assert_close(x, expected, 1e-6)


def test_logn(library):
    config = make_config(GoldenModel("b").config)
    for position in (0, 510, 511, 512, 700, 8000):
        logn = max(1.0, math.log(position + 1) / math.log(512))
        scale = library.dll.qvlt_query_scale(config, position)
        assert scale == pytest.approx(logn / math.sqrt(config.head_dim), rel=1e-6)


def rounded_to_pool(x, dtype):
    """Keys or values [tokens, heads, head_dim] rounded as by a block pool of this type, as float32."""
    if dtype == BFLOAT16:
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    if dtype == FLOAT16:
        return x.astype(np.float16).astype(np.float32)
    if dtype == INT8:
        largest = np.abs(x).max(-1, keepdims=True)
        return np.rint(x.astype(np.float64) / largest * 127).astype(np.float32) * (largest / np.float32(127))
    return x


# n: queries; causal: query i sees the first n_keys - n + i + 1 keys, else all; tile: tokens of a block of the pool.
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, INT8])
@pytest.mark.parametrize(
    ("heads", "head_dim", "n", "n_keys", "causal", "tile"),
    [
        (1, 1, 1, 1, 1, 32),
        (2, 104, 5, 70, 0, 64),
        (3, 33, 40, 40, 1, 16),
        (2, 128, 1, 77, 1, 32),
        (2, 64, 3, 65, 1, 1),
        (1, 20, 300, 300, 1, 32),
        (1, 16, 70, 333, 1, 256),
        (1, 48, 2, 2100, 1, 32),
        (5, 16, 3, 600, 1, 100),
    ],
)
def test_attention(library, isa, dtype, heads, head_dim, n, n_keys, causal, tile):
    q, k, v = normal(n, heads, head_dim), normal(n_keys, heads, head_dim), normal(n_keys, heads, head_dim)
    if dtype == FLOAT16:
        v[0, 0] = 2e-7  # subnormal in float16
    k_rounded, v_rounded = rounded_to_pool(k, dtype), rounded_to_pool(v, dtype)
    result, expected = np.empty_like(q), np.empty_like(q)
    sizes = heads, head_dim, n, n_keys, causal
    reference_tensors = pointer(q), pointer(k_rounded), pointer(v_rounded), pointer(expected)
    library.dll.qvlr_attention(*sizes, *reference_tensors)
    tensors = pointer(q), pointer(k), pointer(v), pointer(result)

    # rounded: compute in bfloat16 if the ISA can, except with decode. decode: compute each query separately, as in a
    # decode step.
    def attention(threads, rounded, decode):
        assert library.dll.qvlt_attention(isa, threads, dtype, tile, rounded, decode, *sizes, *tensors) == 0

    if causal:
        results = set()
        for threads in (1, 2, 3, 16):
            result[:] = np.nan
            attention(threads, rounded=1, decode=1)
            assert_close(result, expected, 3e-5)
            results.add(result.tobytes())
        assert len(results) == 1
    attention(2, rounded=0, decode=0)
    assert_close(result, expected, 3e-5)  # e^(score + error) has the relative error `error`
    attention(2, rounded=1, decode=0)
    if isa != ISAS["avx512_bf16"]:
        assert_close(result, expected, 3e-5)
        return
    # In bfloat16, scores of tens have errors of tenths. With smaller queries the scores are about 1, and many keys have
    # weights that are not negligible.
    q *= head_dim**-0.5
    library.dll.qvlr_attention(*sizes, *reference_tensors)
    attention(2, rounded=1, decode=0)
    assert_close(result, expected, 6e-2)
    error = np.sqrt(np.mean((result - expected) ** 2) / np.mean(expected**2))
    assert error < 8e-3
    # The products are in bfloat16. With one key the weight is 1, and the rounded value may be exact.
    assert error > 1e-5 or n_keys == 1


# 10 values of a head: 4, 2 or 1 bytes each, for int8 also a scale of 4 bytes.
@pytest.mark.parametrize(("dtype", "head_bytes"), [(FLOAT32, 40), (BFLOAT16, 20), (FLOAT16, 20), (INT8, 14)])
def test_blocks_of_a_pool(library, dtype, head_bytes):
    """Write all blocks of a pool, copy block 1 onto block 3, and read all blocks."""
    layers, heads, head_dim, n_blocks, block_tokens = 3, 5, 10, 4, 7
    block_bytes = 2 * layers * heads * block_tokens * head_bytes
    data = RANDOM.integers(0, 256, [n_blocks, block_bytes], np.uint8)
    result = np.zeros_like(data)
    sizes = dtype, layers, heads, head_dim, n_blocks, block_tokens
    assert library.dll.qvlt_pool_blocks(*sizes, pointer(data), 1, 3, pointer(result)) == block_bytes
    assert (result == data[[0, 1, 2, 1]]).all()


def test_references(library):
    """The reference loops in C++ (qvlr_*) except rotary, compared with NumPy."""
    x, w, b = normal(3, 20), normal(5, 20), normal(5)
    y = np.empty([3, 5], np.float32)
    library.dll.qvlr_linear(3, 5, 20, pointer(x), pointer(w), pointer(b), 0, pointer(y))
    assert_close(y, x.astype(float) @ w.T.astype(float) + b, 1e-6)
    weight, bias, normed = normal(20), normal(20), np.empty_like(x)
    library.dll.qvlr_layer_norm(3, 20, pointer(x), pointer(weight), pointer(bias), 1e-6, pointer(normed))
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    assert_close(normed, (x - mean) / np.sqrt(variance + 1e-6) * weight + bias, 2e-6)
    library.dll.qvlr_rms_norm(3, 20, pointer(x), pointer(weight), 1e-6, pointer(normed))
    assert_close(normed, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight, 2e-6)
    gelu, silu, gate = x.copy(), x.copy(), normal(3, 20)
    library.dll.qvlr_gelu(x.size, pointer(gelu))
    assert_close(gelu, np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x), 1e-6)
    library.dll.qvlr_silu_mul(x.size, pointer(gate), pointer(silu))
    assert_close(silu, x * gate / (1 + np.exp(-gate)), 1e-6)
    q, k, v = normal(4, 2, 8), normal(9, 2, 8), normal(9, 2, 8)
    result = np.empty_like(q)
    library.dll.qvlr_attention(2, 8, 4, 9, 1, pointer(q), pointer(k), pointer(v), pointer(result))
    scores = np.einsum("qhd,khd->hqk", q, k)
    scores[:, np.arange(9)[None, :] > np.arange(4)[:, None] + 5] = -np.inf
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert_close(result, np.einsum("hqk,khd->qhd", weights, v), 2e-6)
