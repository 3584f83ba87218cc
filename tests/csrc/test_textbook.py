"""The versions of the kernels in csrc/textbook, for every ISA of this processor, compared with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from engine import BFLOAT16, INT4_G128, pointer
from test_kernels import rounded_activations, rounded_to_pool

RANDOM = np.random.default_rng(6)
MATVEC_BF16, MATVEC_INT4, ATTENTION = range(3)
N_VERSIONS = {MATVEC_BF16: 6, MATVEC_INT4: 6, ATTENTION: 6}
# From this index on (v3 is the first, as indices begin at 0), the versions of MATVEC_INT4 round activations to int8, as
# the production kernel does.
FIRST_INT8_VERSION = 2
# Rows, columns: less than, equal to and more than the sizes of SIMD vectors, the rows that a kernel computes at once,
# groups of 128 and blocks of up to 512.
SHAPES = [(1, 1), (3, 7), (5, 16), (4, 64), (17, 33), (6, 127), (8, 128), (7, 384), (13, 1100), (130, 2100)]


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def assert_close(values, expected, bound, sizes):
    """The largest difference, as a share of the expected values' root mean square, is within the bound."""
    assert np.isfinite(values).all(), sizes
    error = np.abs(values - expected).max() / np.sqrt(np.mean(np.square(expected)))
    assert error <= bound, (sizes, error)


def test_every_version_is_tested(library):
    for kernel, n_versions in N_VERSIONS.items():
        names = [library.dll.qvlt_textbook_name(kernel, version) for version in range(n_versions + 1)]
        assert all(names[:n_versions])
        assert names[n_versions] is None
        assert names[n_versions - 1].endswith(b"production")


@pytest.mark.parametrize(
    ("kernel", "dtype", "version"),
    [
        (kernel, dtype, version)
        for kernel, dtype in ((MATVEC_BF16, BFLOAT16), (MATVEC_INT4, INT4_G128))
        for version in range(N_VERSIONS[kernel])
    ],
)
def test_matvec(library, isa, kernel, dtype, version):
    for rows, columns in SHAPES:
        packed = library.pack(normal(rows, columns), dtype)
        weights = library.unpack(packed, dtype, rows, columns).astype(np.float64)
        x, y = normal(1, columns), np.full(rows, np.nan, np.float32)
        assert not library.dll.qvlt_textbook_matvec(
            *(isa, version, dtype, rows, columns, pointer(x), pointer(packed), pointer(y))
        )
        if kernel == MATVEC_INT4 and version >= FIRST_INT8_VERSION:
            x = rounded_activations(x, isa, dtype)
        # With few rows, all sums may be small because products cancel; the error is then a larger share of them.
        bound = 2e-5 * max(1, np.sqrt(8 / rows))
        assert_close(y, weights @ x[0].astype(np.float64), bound, (rows, columns))


@pytest.mark.parametrize("version", range(N_VERSIONS[ATTENTION]))
@pytest.mark.parametrize("scores", ["of_tens", "scaled", "large"])
def test_attention(library, isa, version, scores):
    """Scores of tens (few keys with large weights), scaled to about 1 (many), and over 88, where e^score overflows."""
    for heads, head_dim, n_keys, block in [
        (1, 1, 1, 1),
        (2, 104, 70, 64),
        (3, 33, 40, 16),
        (2, 128, 77, 16),
        (1, 20, 300, 256),
        (2, 64, 65, 1),
        (5, 16, 600, 100),
        (1, 48, 2100, 16),
    ]:
        q = normal(heads, head_dim) * np.float32(1 if scores == "of_tens" else head_dim**-0.5)
        k, v = (rounded_to_pool(normal(n_keys, heads, head_dim), BFLOAT16) for _ in range(2))
        if scores == "large":
            q[:, 0], k[:, :, 0] = 100, 1
        result = np.full_like(q, np.nan)
        cache = in_blocks(k, v, block)
        assert not library.dll.qvlt_textbook_attention(
            *(isa, version, heads, head_dim, n_keys, block, pointer(q), pointer(cache), pointer(result))
        )
        exact_scores = np.einsum("hd,thd->ht", q.astype(np.float64), k)
        weights = np.exp(exact_scores - exact_scores.max(-1, keepdims=True))
        expected = np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v)
        assert_close(result, expected, 2e-4 if scores == "large" else 3e-5, (heads, head_dim, n_keys, block))


def in_blocks(k, v, block):
    """Keys and values [tokens, heads, head_dim] as bfloat16 blocks [2, heads, block, head_dim], padded with NaN."""
    n_keys, heads, head_dim = k.shape
    bfloat16_nan = 0x7FC0
    cache = np.full([-(-n_keys // block) * block, 2, heads, head_dim], bfloat16_nan, np.uint16)
    for i, values in enumerate((k, v)):
        cache[:n_keys, i] = values.view(np.uint32) >> 16
    return np.ascontiguousarray(cache.reshape(-1, block, 2, heads, head_dim).transpose(0, 2, 3, 1, 4))
