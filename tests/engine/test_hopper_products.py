"""Hopper's kernels for decode products, and all GPUs' kernels for adapters, run on the host, compared with float64.

A row has the same bits in any batch. On the host, copies overtake each other and products are computed as late as
possible, so that a kernel that reuses shared memory too early gives wrong results.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.engine import sources

FOLDER = Path(__file__).parent / "host_gpu"
FLOAT32, BFLOAT16, INT8, INT4_G64, INT4_G128 = range(5)  # qvl_dtype
# qvl_dtype of the types with zero points -> (bits, group size).
GROUPS = {6: (4, 32), 7: (4, 64), 8: (4, 128), 9: (8, 32), 10: (8, 64), 11: (8, 128)}
EPILOGUES = ("half", "float", "add", "gelu", "silu_times")  # enum class Epilogue of csrc/cuda/ops.h


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    csrc, target = sources.source_folder(), tmp_path_factory.mktemp("host") / "libhost.so"
    files = (
        FOLDER / "linear_decode.cc",
        *(csrc / "cuda" / f"{name}.cc" for name in ("linear_decode", "linear_decode_hopper", "low_rank")),
        *(csrc / "core" / "pack.cc", csrc / "core" / "config.cc"),
    )
    compiler = os.environ.get("CXX", "g++")
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
    folders = (f"-I{FOLDER}", f"-I{csrc}", f"-I{csrc / 'include'}")
    try:
        result = subprocess.run(
            (compiler, *flags, *folders, "-o", target, *files), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip(f"no compiler {compiler}; install g++ 11 or newer")
    if "unrecognized" in result.stderr or "<barrier>" in result.stderr:
        pytest.skip(f"{compiler} has no C++20; install g++ 11 or newer")
    assert result.returncode == 0, result.stderr[-4000:]
    host = ctypes.CDLL(str(target))
    host.host_linear.restype = ctypes.c_char_p
    return host


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Values rounded to the nearest bfloat16, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """Float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def matrix(random: np.random.Generator, dtype: int, out: int, width: int) -> tuple[bytes, np.ndarray]:
    """A random matrix in the storage of files (qwenvl.h), and its values in float64 [out, width]."""
    if dtype == BFLOAT16:
        bits = bfloat16(random.standard_normal((out, width)))
        return bits.tobytes(), to_float32(bits).astype(np.float64)
    padded = -(-width // 128) * 128
    if dtype in GROUPS:
        return grouped(random, *GROUPS[dtype], out, width)
    low, high = (-128, 128) if dtype == INT8 else (-8, 8)
    values = random.integers(low, high, (out, padded))
    values[:, width:] = 0
    if dtype == INT8:
        scales = random.random(out, np.float32) / 100
        exact = values * scales[:, None].astype(float)
        return values.astype(np.int8).tobytes() + scales.tobytes(), exact[:, :width]
    group = 64 if dtype == INT4_G64 else 128
    scales = bfloat16(random.standard_normal((out, padded // group)) / 10)
    nibbles = (values + 8).reshape(out, padded // 128, 4, 32)  # value 32 * j + i is nibble j of word i
    words = sum(nibbles[:, :, j] << (4 * j) for j in range(4)).astype(np.uint16)
    exact = values * np.repeat(to_float32(scales).astype(float), group, axis=1)
    return words.tobytes() + scales.tobytes(), exact[:, :width]


def grouped(
    random: np.random.Generator, bits: int, group: int, out: int, width: int
) -> tuple[bytes, np.ndarray]:
    """The same as `matrix`, for a type with zero points."""
    padded = -(-width // 128) * 128
    values = random.integers(0, 2**bits, (out, padded))
    values[:, width:] = 0
    scales = (random.standard_normal((out, padded // group)) / 10).astype(np.float16)
    zeros = random.integers(0, 2**bits + 1, scales.shape).astype(np.float16)
    scale, zero = (np.repeat(each, group, axis=1).astype(float) for each in (scales, zeros))
    exact = (values - zero) * scale
    stored = values.astype(np.uint8)
    if bits == 4:
        nibbles = values.reshape(out, padded // 128, 4, 32)  # value 32 * j + i is nibble j of word i
        stored = sum(nibbles[:, :, j] << (4 * j) for j in range(4)).astype(np.uint16)
    return stored.tobytes() + scales.tobytes() + zeros.tobytes(), exact[:, :width]


class Adapted(ctypes.Structure):
    """HostAdapted of host_gpu/linear_decode.cc."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("adapters", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("of_rows", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
    )


class Product:
    """A random matrix and bias, and their products with rows x."""

    def __init__(self, library: ctypes.CDLL, dtype: int, out: int, width: int) -> None:
        random = np.random.default_rng([dtype, out, width])
        self.library, self.dtype, self.out, self.width = library, dtype, out, width
        self.stored, self.exact = matrix(random, dtype, out, width)
        self.bias = random.standard_normal(out, np.float32)

    def run(
        self,
        x: np.ndarray,
        epilogue: str = "float",
        y: Optional[np.ndarray] = None,
        adapted: Optional[Adapted] = None,
    ) -> np.ndarray:
        """Compute y = x W^T + bias with an epilogue.

        x: bfloat16 bits [n, stride], of which `width` columns are used. y: values before the product, to which the
        epilogue "add" adds; default: NaN.
        """
        n = len(x)
        if y is None:
            y = np.full((n, self.out // 2 if epilogue == "silu_times" else self.out), np.nan, np.float32)
            y = y if epilogue == "float" else bfloat16(y)
        error = self.library.host_linear(
            *(self.dtype, self.out, self.width, self.stored, self.bias.ctypes.data_as(ctypes.c_void_p)),
            *(x.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.shape[1]), n, EPILOGUES.index(epilogue)),
            *(y.ctypes.data_as(ctypes.c_void_p), None if adapted is None else ctypes.byref(adapted)),
        )
        assert error is None, error.decode()
        return y


def rows(n: int, width: int) -> np.ndarray:
    """Random bfloat16 bits [n, stride], NaN after the first `width` values of a row."""
    x = np.full((n, (width + 7) // 8 * 8 + 8), np.nan, np.float32)
    x[:, :width] = np.random.default_rng([n, width]).standard_normal((n, width))
    return bfloat16(x)


KINDS = {"bfloat16": BFLOAT16, "int8": INT8, "int4_g64": INT4_G64, "int4_g128": INT4_G128}
KINDS.update({f"uint{bits}_g{group}": dtype for dtype, (bits, group) in GROUPS.items()})


# Outputs, inputs, rows.
SIZES = [(2, 8, 1), (38, 200, 3), (500, 1216, 8), (300, 832, 13), (1300, 640, 30), (260, 704, 70)]
# Each thread of a block is a thread of the host, so a case takes seconds: types with zero points have fewer sizes.
CASES = [(kind, *size) for kind in KINDS for size in (SIZES[1:4:2] if "uint" in kind else SIZES)]


@pytest.mark.parametrize(("kind", "out", "width", "n"), CASES)
def test_products_against_float64(library: ctypes.CDLL, kind: str, out: int, width: int, n: int) -> None:
    product, x = Product(library, KINDS[kind], out, width), rows(n, width)
    exact_x = to_float32(x)[:, :width].astype(np.float64)
    reference = exact_x @ product.exact.T + product.bias
    # Rounding errors of sums in float32.
    bound = np.abs(exact_x) @ np.abs(product.exact.T) * 2.0**-18 + 1e-6
    assert (np.abs(product.run(x) - reference) <= bound).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4_g64", "uint4_g32"])
@pytest.mark.parametrize(("out", "width"), [(470, 1100)])
def test_a_row_does_not_depend_on_the_others(library: ctypes.CDLL, kind: str, out: int, width: int) -> None:
    product, x = Product(library, KINDS[kind], out, width), rows(66, width)
    alone = np.concatenate([product.run(x[i : i + 1]) for i in (0, 7)])
    for n in (8, 17, 66):
        y = product.run(x[:n])
        assert (y[[0, 7]] == alone).all(), n


def test_epilogues(library: ctypes.CDLL) -> None:
    """Results converted to bfloat16, added to y, or passed to an activation."""
    product, x = Product(library, BFLOAT16, 74, 264), rows(9, 264)
    sums = product.run(x)
    before = np.random.default_rng(0).standard_normal(sums.shape, np.float32)
    assert (product.run(x, "add", before.copy()) == before + sums).all()
    assert (product.run(x, "half") == bfloat16(sums)).all()
    gelu = np.vectorize(lambda value: value * (1 + math.erf(value / 2**0.5)) / 2)(sums.astype(float))
    assert np.allclose(to_float32(product.run(x, "gelu")), gelu, rtol=2.0**-8, atol=5e-5)
    value, gate = sums[:, 0::2].astype(float), sums[:, 1::2].astype(float)
    found = to_float32(product.run(x, "silu_times"))
    expected = value * gate / (1 + np.exp(-gate))
    assert np.allclose(found, expected, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "out", "width", "n", "rank"),
    [("bfloat16", 40, 648, 19, 8), ("int4_g64", 74, 1160, 5, 72), ("bfloat16", 40, 1160, 4, 16)],
)
def test_low_rank_adapters(library: ctypes.CDLL, kind: str, out: int, width: int, n: int, rank: int) -> None:
    """A x and B (A x) of a row's adapter are close to float64.

    Rows without an adapter have the same bits as in a product without adapters.
    """
    product, x = Product(library, KINDS[kind], out, width), rows(n, width)
    random = np.random.default_rng(n)
    a = bfloat16(random.standard_normal((5, rank, width), np.float32))
    b = bfloat16(random.standard_normal((5, out, rank), np.float32))
    adapters = random.integers(-1, 5, n).astype(np.int32)  # the adapter of each row, -1 for none
    order = np.argsort(adapters, kind="stable").astype(np.int32)
    unwritten = bfloat16(np.float32(np.nan))
    low = np.full((n, rank), unwritten)
    a_at, b_at, *others = (array.ctypes.data for array in (a, b, adapters, order, low))
    y, alone = product.run(x, adapted=Adapted(a_at, b_at, len(a), rank, *others)), product.run(x)
    exact_x = to_float32(x)[:, :width].astype(np.float64)
    for i, adapter in enumerate(adapters):
        if adapter < 0:
            assert (low[i] == unwritten).all()
            assert (y[i] == alone[i]).all()
            continue
        exact_a, exact_b = (to_float32(each[adapter]).astype(np.float64) for each in (a, b))
        exact = exact_a @ exact_x[i]
        # Rounding errors of sums in float32, and of A x in bfloat16.
        bound = np.abs(exact_a) @ np.abs(exact_x[i]) * 2.0**-18 + np.abs(exact) * 2.0**-8
        found = to_float32(low[i]).astype(np.float64)
        assert (np.abs(found - exact) <= bound).all(), i
        # The same of B (A x), and of its addition to the product.
        bound = np.abs(exact_b) @ np.abs(found) * 2.0**-18 + np.abs(alone[i]) * 2.0**-22
        assert (np.abs(y[i] - alone[i] - exact_b @ found) <= bound).all(), i
