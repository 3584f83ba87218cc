"""Hopper's products of decode steps, the kernels' own code on the host.

Results against float64, and the same bits for a row in any batch. Copies overtake each other and
products are as late as possible, so that shared memory that is reused too early gives wrong results.
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
GROUPS = {
    6: (4, 32),
    7: (4, 64),
    8: (4, 128),
    9: (8, 32),
    10: (8, 64),
    11: (8, 128),
}  # with zero points: bits, group
INTOS = ("half", "float", "add", "gelu", "silu_times")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    csrc, target = sources.source_folder(), tmp_path_factory.mktemp("host") / "libhost.so"
    files = (
        *(FOLDER / "linear_decode.cc", csrc / "cuda" / "linear_decode.cc"),
        *(csrc / "cuda" / "linear_decode_hopper.cc", csrc / "core" / "pack.cc", csrc / "core" / "config.cc"),
    )
    compiler = os.environ.get("CXX", "g++")
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
    folders = (f"-I{FOLDER}", f"-I{csrc}", f"-I{csrc / 'include'}")
    try:
        made = subprocess.run(
            (compiler, *flags, *folders, "-o", target, *files), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip(f"no compiler {compiler}; install g++ 11 or newer")
    if "unrecognized" in made.stderr or "<barrier>" in made.stderr:
        pytest.skip(f"{compiler} has no C++20; install g++ 11 or newer")
    assert made.returncode == 0, made.stderr[-4000:]
    found = ctypes.CDLL(str(target))
    found.host_linear.restype = ctypes.c_char_p
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, as bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def matrix(random: np.random.Generator, dtype: int, out: int, width: int) -> tuple[bytes, np.ndarray]:
    """A random matrix in the storage of files (qwenvl.h), and its values in float64 [out, width]."""
    if dtype == BFLOAT16:
        bits = bfloat16(random.standard_normal((out, width)))
        return bits.tobytes(), widened(bits).astype(np.float64)
    padded = -(-width // 128) * 128
    if dtype in GROUPS:
        return grouped(random, *GROUPS[dtype], out, width)
    low, high = (-128, 128) if dtype == INT8 else (-8, 8)
    values = random.integers(low, high, (out, padded))
    values[:, width:] = 0
    if dtype == INT8:
        scales = random.random(out, np.float32) / 100
        return values.astype(np.int8).tobytes() + scales.tobytes(), (values * scales[:, None].astype(float))[
            :, :width
        ]
    group = 64 if dtype == INT4_G64 else 128
    scales = bfloat16(random.standard_normal((out, padded // group)) / 10)
    nibbles = (values + 8).reshape(out, padded // 128, 4, 32)  # value 32 j + i is nibble j of word i
    words = sum(nibbles[:, :, j] << (4 * j) for j in range(4)).astype(np.uint16)
    exact = values * np.repeat(widened(scales).astype(float), group, axis=1)
    return words.tobytes() + scales.tobytes(), exact[:, :width]


def grouped(
    random: np.random.Generator, bits: int, group: int, out: int, width: int
) -> tuple[bytes, np.ndarray]:
    """As `matrix`, a type with zero points."""
    padded = -(-width // 128) * 128
    values = random.integers(0, 2**bits, (out, padded))
    values[:, width:] = 0
    scales = (random.standard_normal((out, padded // group)) / 10).astype(np.float16)
    zeros = random.integers(0, 2**bits + 1, scales.shape).astype(np.float16)
    exact = (values - np.repeat(zeros, group, axis=1).astype(float)) * np.repeat(
        scales, group, axis=1
    ).astype(float)
    stored = values.astype(np.uint8)
    if bits == 4:
        nibbles = values.reshape(out, padded // 128, 4, 32)
        stored = sum(nibbles[:, :, j] << (4 * j) for j in range(4)).astype(np.uint16)
    return stored.tobytes() + scales.tobytes() + zeros.tobytes(), exact[:, :width]


class Adapted(ctypes.Structure):
    """HostAdapted of host_gpu/linear_decode.cc."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("adapters", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("of_rows", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
    )


class Product:
    def __init__(self, library: ctypes.CDLL, dtype: int, out: int, width: int) -> None:
        random = np.random.default_rng([dtype, out, width])
        self.library, self.dtype, self.out, self.width = library, dtype, out, width
        self.stored, self.exact = matrix(random, dtype, out, width)
        self.bias = random.standard_normal(out, np.float32)

    def run(
        self,
        x: np.ndarray,
        into: str = "float",
        y: Optional[np.ndarray] = None,
        adapted: Optional[Adapted] = None,
    ) -> np.ndarray:
        """x: bits [n, stride]; values after the first `width` must not count."""
        n = len(x)
        if y is None:
            y = np.full((n, self.out // 2 if into == "silu_times" else self.out), np.nan, np.float32)
            y = y if into == "float" else bfloat16(y)
        failed = self.library.host_linear(
            *(self.dtype, self.out, self.width, self.stored, self.bias.ctypes.data_as(ctypes.c_void_p)),
            *(x.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.shape[1]), n, INTOS.index(into)),
            *(y.ctypes.data_as(ctypes.c_void_p), None if adapted is None else ctypes.byref(adapted)),
        )
        assert failed is None, failed.decode()
        return y


def rows(n: int, width: int) -> np.ndarray:
    x = np.full((n, (width + 7) // 8 * 8 + 8), np.nan, np.float32)
    x[:, :width] = np.random.default_rng([n, width]).standard_normal((n, width))
    return bfloat16(x)


KINDS = {"bfloat16": BFLOAT16, "int8": INT8, "int4_g64": INT4_G64, "int4_g128": INT4_G128}
KINDS.update({f"uint{bits}_g{group}": dtype for dtype, (bits, group) in GROUPS.items()})


SIZES = [(2, 8, 1), (38, 200, 3), (500, 1216, 8), (300, 832, 13), (1300, 640, 30), (260, 704, 70)]
# A block's threads are threads of the host, which takes seconds: types with zero points at fewer sizes.
CASES = [(kind, *size) for kind in KINDS for size in (SIZES[1:4:2] if "uint" in kind else SIZES)]


@pytest.mark.parametrize(("kind", "out", "width", "n"), CASES)
def test_is_that_of_float64(library: ctypes.CDLL, kind: str, out: int, width: int, n: int) -> None:
    product, x = Product(library, KINDS[kind], out, width), rows(n, width)
    wide = widened(x)[:, :width].astype(np.float64)
    reference = wide @ product.exact.T + product.bias
    room = np.abs(wide) @ np.abs(product.exact.T) * 2.0**-18 + 1e-6
    assert (np.abs(product.run(x) - reference) <= room).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4_g64", "uint4_g32"])
@pytest.mark.parametrize(("out", "width"), [(470, 1100)])
def test_a_row_does_not_depend_on_the_others(library: ctypes.CDLL, kind: str, out: int, width: int) -> None:
    product, x = Product(library, KINDS[kind], out, width), rows(66, width)
    alone = np.concatenate([product.run(x[i : i + 1]) for i in (0, 7)])
    for n in (8, 17, 66):
        seen = product.run(x[:n])
        assert (seen[[0, 7]] == alone).all(), n


def test_results_are_finished(library: ctypes.CDLL) -> None:
    """Epilogues: bias, types, addition and activations."""
    product, x = Product(library, BFLOAT16, 74, 264), rows(9, 264)
    sums = product.run(x)
    before = np.random.default_rng(0).standard_normal(sums.shape, np.float32)
    assert (product.run(x, "add", before.copy()) == before + sums).all()
    assert (product.run(x, "half") == bfloat16(sums)).all()
    normal = np.vectorize(lambda each: each * (1 + math.erf(each / 2**0.5)) / 2)(sums.astype(float))
    assert np.allclose(widened(product.run(x, "gelu")), normal, rtol=2.0**-8, atol=5e-5)
    value, gate = sums[:, 0::2].astype(float), sums[:, 1::2].astype(float)
    seen = widened(product.run(x, "silu_times"))
    expected = value * gate / (1 + np.exp(-gate))
    assert np.allclose(seen, expected, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "out", "width", "n"), [("bfloat16", 40, 648, 19), ("int4_g64", 40, 4136, 5)]
)
def test_low_rank_adapters(library: ctypes.CDLL, kind: str, out: int, width: int, n: int) -> None:
    """A x of the rows' adapters against float64, and the bits of the product without adapters."""
    product, x, rank = Product(library, KINDS[kind], out, width), rows(n, width), 8
    random = np.random.default_rng(n)
    a = bfloat16(random.standard_normal((5, rank, width), np.float32))
    of_rows = random.integers(-1, 5, n).astype(np.int32)
    order = np.argsort(of_rows, kind="stable").astype(np.int32)
    nothing = bfloat16(np.float32(np.nan))
    low = np.full((n, rank), nothing)
    addresses = [each.ctypes.data for each in (a, of_rows, order, low)]
    got = product.run(x, adapted=Adapted(addresses[0], len(a), rank, *addresses[1:]))
    assert (got == product.run(x)).all()
    wide = widened(x)[:, :width].astype(np.float64)
    for i, adapter in enumerate(of_rows):
        if adapter < 0:
            assert (low[i] == nothing).all()
            continue
        of_row = widened(a[adapter]).astype(np.float64)
        exact, room = of_row @ wide[i], np.abs(of_row) @ np.abs(wide[i]) * 2.0**-18
        assert (np.abs(widened(low[i]) - exact) <= room + np.abs(exact) * 2.0**-8).all(), i
