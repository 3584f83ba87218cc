"""Kernels of decode steps, compared with float64: products with every storage type, and paged attention.

Also products of prompts, with every storage type.
"""

from __future__ import annotations

import ctypes
import math

import pytest

torch = pytest.importorskip("torch", reason="tests of GPU kernels need PyTorch")

# Compute types by their numbers in the launchers' argument `half`, and their rounding errors.
HALVES = {0: torch.bfloat16, 1: torch.float16}
EPSILON = {0: 2.0**-8, 1: 2.0**-11}
SUBNORMAL_ERROR = 2.0**-25  # half the spacing of subnormal float16 numbers; that of bfloat16 is smaller
FLOAT32, BFLOAT16, INT8, INT4_G64, INT4_G128, FLOAT16 = range(6)  # qvl_dtype
# qvl_dtype of the types with zero points -> (bits, group size).
GROUPS = {6: (4, 32), 7: (4, 64), 8: (4, 128), 9: (8, 32), 10: (8, 64), 11: (8, 128)}
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, INT8: torch.int8}
# Storage on the GPU -> qvl_dtype of the uploaded matrix, in the order of the launchers' numbers. "half" is the compute
# type.
STORAGES = {"half": BFLOAT16, "int8": INT8, "int4_g64": INT4_G64, "int4_g128": INT4_G128}
STORAGES.update({"uint4_g32": 6, "uint4_g64": 7, "uint4_g128": 8, "uint8_g32": 9, "uint8_g64": 10})
EPILOGUES = ("half", "float", "add", "gelu", "silu_times")  # enum class Epilogue of csrc/cuda/ops.h


def round_up(value, unit):
    return (value + unit - 1) // unit * unit


def random_integers(low, high, *shape):
    return torch.randint(low, high, shape, device="cuda")


def stored_matrix(dtype, out, width):
    """A random matrix: its bytes in the layout of files (qwenvl.h), and its values in float64 [out, width]."""
    if dtype in (FLOAT32, BFLOAT16, FLOAT16):
        stored = torch.randn(out, width, device="cuda").to(DTYPES[dtype])
        return stored.view(torch.uint8).flatten(), stored.double()
    padded = round_up(width, 128)
    inside = torch.arange(padded, device="cuda") < width
    if dtype in GROUPS:
        return stored_groups(*GROUPS[dtype], out, width)
    if dtype == INT8:
        values = random_integers(-128, 128, out, padded) * inside
        scales = torch.rand(out, device="cuda") / 100 + 0.001
        stored = torch.cat([values.to(torch.int8).view(torch.uint8).flatten(), scales.view(torch.uint8)])
        return stored, (values.double() * scales.double()[:, None])[:, :width]
    group = 64 if dtype == INT4_G64 else 128
    values = random_integers(-8, 8, out, padded) * inside
    scales = (torch.randn(out, padded // group, device="cuda") / 10).bfloat16()
    nibbles = (values + 8).view(out, padded // 128, 4, 32)  # value 32 * j + i is nibble j of word i
    low, high = nibbles[:, :, 0] | nibbles[:, :, 1] << 4, nibbles[:, :, 2] | nibbles[:, :, 3] << 4
    stored = torch.stack([low, high], dim=-1).to(torch.uint8)
    stored = torch.cat([stored.flatten(), scales.view(torch.uint8).flatten()])
    return stored, (values * scales.double().repeat_interleave(group, dim=1))[:, :width]


def stored_groups(bits, group, out, width):
    """The same as `stored_matrix`, for a type with zero points."""
    padded = round_up(width, 128)
    values = random_integers(0, 2**bits, out, padded) * (torch.arange(padded, device="cuda") < width)
    scales = (torch.randn(out, padded // group, device="cuda") / 2**bits).half()
    zeros = random_integers(0, 2**bits + 1, out, padded // group)
    scale, zero = (each.double().repeat_interleave(group, dim=1) for each in (scales, zeros))
    if bits == 4:
        nibbles = values.view(out, padded // 128, 4, 32)  # value 32 * j + i is nibble j of word i
        low, high = nibbles[:, :, 0] | nibbles[:, :, 1] << 4, nibbles[:, :, 2] | nibbles[:, :, 3] << 4
        values_stored = torch.stack([low, high], dim=-1).to(torch.uint8)
    else:
        values_stored = values.to(torch.uint8)
    parts = (values_stored, scales.view(torch.uint8), zeros.half().view(torch.uint8))
    return torch.cat([part.flatten() for part in parts]), (scale * (values - zero))[:, :width]


class Matrix:
    """A matrix on the GPU.

    `parts`: (bytes, dtype, rows, first, step) of each uploaded matrix, whose row i becomes row first + i * step.
    """

    def __init__(self, library, launch, half, storage, out, width, parts):
        self.half, self.launch = half, launch
        values, scales = ctypes.c_uint64(), ctypes.c_uint64()
        index = list(STORAGES).index(storage)
        library.decode_matrix_bytes(index, out, width, ctypes.byref(values), ctypes.byref(scales))
        self.values = torch.full((values.value,), 255, dtype=torch.uint8, device="cuda")
        self.scales = torch.full((scales.value,), 255, dtype=torch.uint8, device="cuda")
        stride = round_up(width, 8 if storage == "half" else 128)
        self.shape = (index, out, width, stride, self.values, self.scales)
        for stored, dtype, rows, first, step in parts:
            launch("decode_upload", half, dtype, stored, rows, *self.shape, first, step)

    def product(self, x, epilogue, y, bias=None):
        self.launch(
            *("decode_linear", self.half, *self.shape, bias, x, ctypes.c_int64(x.shape[1]), len(x)),
            *(EPILOGUES.index(epilogue), y),
        )
        return y

    def prompt_product(self, x, epilogue, y):
        out, stride = self.shape[1], self.shape[3]
        scratch = torch.full((out, stride), math.nan, dtype=HALVES[self.half], device="cuda")
        self.launch(
            *("decode_prompt_linear", self.half, *self.shape, None, x, ctypes.c_int64(x.shape[1]), len(x)),
            *(EPILOGUES.index(epilogue), y, scratch),
        )
        return y


def random_matrix(library, launch, half, storage, out, width):
    dtype = STORAGES[storage]
    stored, exact = stored_matrix(dtype, out, width)
    if storage == "half":
        exact = exact.to(HALVES[half]).double()
    return Matrix(library, launch, half, storage, out, width, [(stored, dtype, out, 0, 1)]), exact


def random_rows(half, n, width, stride):
    """Random rows [n, stride] with NaN after `width` values."""
    x = torch.full((n, stride), math.nan, dtype=HALVES[half], device="cuda")
    x[:, :width] = torch.randn(n, width, device="cuda")
    return x


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("out", "width", "n"),  # outputs, inputs, rows
    [
        *((2, 1, 1), (16, 128, 8), (38, 200, 3), (130, 1000, 33), (518, 2056, 9), (94, 11008, 7)),
        *((4096, 4096, 1), (4096, 4096, 16), (300, 4096, 70), (258, 11008, 40), (62, 384, 256)),
    ],
)
def test_a_product_is_that_of_float64(cuda_library, launch, half, storage, out, width, n):
    matrix, exact = random_matrix(cuda_library, launch, half, storage, out, width)
    x = random_rows(half, n, width, round_up(width, 8) + 8)
    exact_x = x[:, :width].double()
    bias = torch.randn(out, device="cuda")
    product = exact_x @ exact.T + bias.double()
    sum_error = exact_x.abs() @ exact.abs().T * 2.0**-18 + 1e-6  # of additions in float32
    before = torch.randn(n, out, device="cuda")
    silu = product[:, 0::2] * (product[:, 1::2] * torch.sigmoid(product[:, 1::2]))
    # The slope of SiLU is at most 1.1, and that of GELU 1.2.
    silu_error = sum_error[:, 0::2] * product[:, 1::2].abs() + 1e-6
    silu_error = silu_error + sum_error[:, 1::2] * product[:, 0::2].abs() * 1.1
    expected = {
        "half": (product, sum_error),
        "float": (product, sum_error),
        "add": (product + before.double(), sum_error + before.abs().double() * 2.0**-23),
        # 5e-5: the error of the polynomial for GELU that linear_decode uses on Hopper.
        "gelu": (product * torch.special.ndtr(product), sum_error * 1.2 + 5e-5),
        "silu_times": (silu, silu_error + silu.abs() * 2.0**-19),
    }
    for epilogue, (reference, bound) in expected.items():
        as_float = epilogue in ("float", "add")
        y = torch.full((n + 1, reference.shape[1]), math.nan, device="cuda")
        y = y if as_float else y.to(HALVES[half])
        if epilogue == "add":
            y[:n] = before
        matrix.product(x, epilogue, y, bias)
        if not as_float:
            # The kernels limit float16 results to the largest float16 number.
            reference = reference.clamp(-65504, 65504) if half else reference
            bound = bound + reference.abs() * EPSILON[half] + SUBNORMAL_ERROR
        error = (y[:n].double() - reference).abs()
        assert (error <= bound).all(), (epilogue, (error / bound).nan_to_num(math.inf).max().item())
        assert y[n].isnan().all(), epilogue


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("out", "width", "n"), [(16, 128, 3), (30, 200, 77), (640, 1000, 284)])
@pytest.mark.parametrize("epilogue", ["float", "silu_times"])
def test_a_prompt_product_is_that_of_float64(cuda_library, launch, half, storage, out, width, n, epilogue):
    """The reference is computed in float64 from weights rounded to the compute type."""
    matrix, exact = random_matrix(cuda_library, launch, half, storage, out, width)
    exact = exact.to(HALVES[half]).double()
    x = random_rows(half, n, width, round_up(width, 8) + 8)
    exact_x = x[:, :width].double()
    expected = exact_x @ exact.T
    bound = exact_x.abs() @ exact.abs().T * 2.0**-16 + 1e-5
    if epilogue == "silu_times":
        gate = expected[:, 1::2]
        bound = bound[:, 0::2] * gate.abs() + bound[:, 1::2] * expected[:, 0::2].abs() * 1.1 + 1e-5
        expected = expected[:, 0::2] * (gate * torch.sigmoid(gate))
        bound = bound + expected.abs() * EPSILON[half]
    y = torch.full((n + 1, expected.shape[1]), math.nan, device="cuda")
    y = y if epilogue == "float" else y.to(HALVES[half])
    matrix.prompt_product(x, epilogue, y)
    error = (y[:n].double() - expected).abs()
    assert (error <= bound).all(), (error / bound).nan_to_num(math.inf).max().item()
    assert y[n].isnan().all()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("out", "width"), [(200, 200), (4096, 4096), (400, 11008)])
def test_a_row_does_not_depend_on_the_others(cuda_library, launch, half, storage, out, width):
    matrix, _ = random_matrix(cuda_library, launch, half, storage, out, width)
    x = torch.randn(256, width, device="cuda").to(HALVES[half])

    def product(rows):
        return matrix.product(
            rows.contiguous(), "float", torch.full((len(rows), out), math.nan, device="cuda")
        )

    alone = torch.cat([product(x[i : i + 1]) for i in range(64)])
    assert not alone.isnan().any()
    for n in (2, 3, 5, 8, 9, 12, 16, 17, 25, 32, 33, 48, 63, 64, 65, 128, 256):
        assert torch.equal(product(x[:n])[:64], alone[:n]), n
        n_reversed = min(n, 64)
        assert torch.equal(product(x[:n_reversed].flip(0)).flip(0), alone[:n_reversed]), n


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, INT8, INT4_G64, INT4_G128, *GROUPS])
@pytest.mark.parametrize(("out", "width"), [(10, 72), (75, 300)])
def test_two_matrices_are_interleaved(cuda_library, launch, half, dtype, out, width):
    storage = next((name for name, stored_as in STORAGES.items() if stored_as == dtype), "half")
    if GROUPS.get(dtype) == (8, 128):
        storage = "uint8_g64"  # a group of 128 is stored as two of 64
    first, first_exact = stored_matrix(dtype, out, width)
    second, second_exact = stored_matrix(dtype, out, width)
    parts = [(first, dtype, out, 0, 2), (second, dtype, out, 1, 2)]
    matrix = Matrix(cuda_library, launch, half, storage, 2 * out, width, parts)
    exact = torch.stack([first_exact, second_exact], dim=1).flatten(0, 1)
    if storage == "half":
        exact = exact.to(HALVES[half]).double()
    # Products with unit vectors read the matrix back exactly.
    for start in range(0, width, 256):
        n = min(256, width - start)
        x = torch.zeros(n, round_up(width, 8), dtype=HALVES[half], device="cuda")
        x[torch.arange(n), start + torch.arange(n)] = 1
        y = matrix.product(x, "float", torch.full((n, 2 * out), math.nan, device="cuda"))
        assert torch.equal(y, exact.T[start : start + n].float())


def test_float16_does_not_overflow(cuda_library, launch):
    stored = torch.tensor([[1e6, -1e6]] * 2, device="cuda")
    matrix = Matrix(cuda_library, launch, 1, "half", 2, 2, [(stored, FLOAT32, 2, 0, 1)])
    x = torch.zeros(2, 8, dtype=torch.float16, device="cuda")
    x[0, 0], x[1, 1] = 1, 60000
    y = matrix.product(x, "half", torch.full((2, 2), math.nan, dtype=torch.float16, device="cuda"))
    assert y.tolist() == [[65504.0] * 2, [-65504.0] * 2]


class Cache:
    """KV cache with sequences of random keys and values in scattered blocks; all other bytes are 255 (floats: NaN)."""

    def __init__(self, dtype, heads, width, block_tokens, lengths):
        self.dtype, self.heads, self.width, self.block_tokens = dtype, heads, width, block_tokens
        n_blocks = [-(-length // block_tokens) for length in lengths]
        total = sum(n_blocks) + 3
        ids = torch.randperm(total)[: sum(n_blocks)].split(n_blocks)
        n_values = 2 * heads * block_tokens * width
        value_bytes = n_values * torch.empty(0, dtype=DTYPES[dtype]).element_size()
        scale_bytes = 2 * heads * block_tokens * 4 if dtype == INT8 else 0
        self.block_bytes = round_up(value_bytes + scale_bytes, 64)
        self.memory = torch.full((total, self.block_bytes), 255, dtype=torch.uint8, device="cuda")
        shape = (total, 2, heads, block_tokens)
        stored = self.memory[:, :value_bytes].view(DTYPES[dtype]).view(*shape, width)
        if dtype == INT8:
            scales = self.memory[:, value_bytes : value_bytes + scale_bytes].view(torch.float32).view(shape)
        self.max_blocks = max(n_blocks) + 2
        self.blocks = torch.full((len(lengths), self.max_blocks), 2**31 - 1, dtype=torch.int32)
        self.sequences = []  # float64 [2, heads, length, width]
        for i, (length, sequence_blocks) in enumerate(zip(lengths, ids)):
            self.blocks[i, : len(sequence_blocks)] = sequence_blocks
            token = torch.arange(length)
            block, slot = sequence_blocks[token // block_tokens], token % block_tokens
            if dtype == INT8:
                values = random_integers(-127, 128, length, 2, heads, width).to(torch.int8)
                scale = torch.rand(length, 2, heads, device="cuda") / 50
                scales[block, :, :, slot] = scale
                exact = values.double() * scale.double()[..., None]
            else:
                values = torch.randn(length, 2, heads, width, device="cuda").to(DTYPES[dtype])
                exact = values.double()
            stored[block, :, :, slot] = values
            self.sequences.append(exact.permute(1, 2, 0, 3))
        self.blocks = self.blocks.cuda()
        self.positions = torch.tensor(lengths, dtype=torch.int32, device="cuda") - 1

    def scratch(self, library, n, max_keys):
        """Scratch memory: zeros for the counters of at most 256 rows, NaN elsewhere."""
        size = library.decode_attention_scratch
        size.restype = ctypes.c_uint64
        n_bytes = size(n, self.heads, self.width, max_keys)
        scratch = torch.full((n_bytes,), 255, dtype=torch.uint8, device="cuda")
        scratch[: 4 * 256 * self.heads] = 0
        return scratch

    def attention(self, library, launch, half, q, rows, max_keys):
        n = len(rows)
        scratch = self.scratch(library, n, max_keys)
        y = torch.full((n + 1, self.heads * self.width), math.nan, dtype=HALVES[half], device="cuda")
        tables = torch.tensor(rows, dtype=torch.int32, device="cuda")
        positions, queries = self.positions[tables].contiguous(), q[tables].contiguous()
        launch(
            *(
                "decode_attention",
                half,
                queries,
                positions,
                tables,
                self.blocks,
                self.max_blocks,
                self.memory,
            ),
            *(ctypes.c_uint64(self.block_bytes), self.block_tokens, self.dtype, self.heads, self.width, n),
            *(max_keys, scratch, y),
        )
        assert y[n].isnan().all()
        assert scratch[: 4 * 256 * self.heads].count_nonzero() == 0
        return y[:n]

    def step(self, library, launch, half, fused, qkv, angles, rows, max_keys):
        """Run rotation and attention on a copy of the cache, in one call if `fused`; return results and copy."""
        n = len(rows)
        scratch, memory = self.scratch(library, n, max_keys), self.memory.clone()
        q = torch.full((n, self.heads * self.width), math.nan, dtype=HALVES[half], device="cuda")
        y = torch.full((n + 1, self.heads * self.width), math.nan, dtype=HALVES[half], device="cuda")
        qkv_rows, blocks = qkv[rows].contiguous(), self.blocks[rows].contiguous()
        positions, tables = (
            self.positions[rows].contiguous(),
            torch.arange(n, dtype=torch.int32, device="cuda"),
        )
        angle_tables, cos, sin, query_scale = angles
        angle_tables = angle_tables[rows].contiguous()
        torch.cuda.synchronize()  # the kernels may read inputs before earlier work on the stream has ended
        launch(
            *("decode_step", half, fused, qkv_rows, positions, angle_tables, tables, blocks),
            *(self.max_blocks, cos, sin, query_scale, len(query_scale), memory),
            *(ctypes.c_uint64(self.block_bytes), self.block_tokens, self.dtype, self.heads, self.width, n),
            *(max_keys, q, scratch, y),
        )
        assert y[n].isnan().all()
        assert not y[:n].isnan().any()
        return y[:n], memory


# Heads, head dimension, tokens per block.
ATTENTION = [
    (heads, width, block_tokens)
    for heads, width in ((3, 128), (5, 8), (2, 18), (3, 64), (1, 256))
    for block_tokens in (1, 7, 32, 256)
]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "block_tokens"), ATTENTION)
def test_attention_is_that_of_float64(cuda_library, launch, half, dtype, heads, width, block_tokens):
    lengths = [1, 2, 127, 128, 129, 300, 31, 33, 513, 64]
    cache = Cache(dtype, heads, width, block_tokens, lengths)
    q = (torch.randn(len(lengths), heads * width, device="cuda") * 2 / math.sqrt(width)).to(HALVES[half])
    y = cache.attention(cuda_library, launch, half, q, list(range(len(lengths))), max(lengths))
    for i, (keys, values) in enumerate(cache.sequences):
        scores = torch.einsum("hd,htd->ht", q[i].double().view(heads, width), keys)
        reference = torch.einsum("ht,htd->hd", scores.softmax(dim=-1), values).flatten()
        bound = reference.abs() * EPSILON[half] + SUBNORMAL_ERROR + values.abs().max() * 2.0**-18
        error = (y[i].double() - reference).abs()
        assert (error <= bound).all(), (lengths[i], (error / bound).nan_to_num(math.inf).max().item())
    # A row has the same bits alone, with a larger max_keys, and in another batch.
    for i, length in enumerate(lengths):
        for max_keys in (length, 1000):
            assert torch.equal(cache.attention(cuda_library, launch, half, q, [i], max_keys)[0], y[i])
    rows = [5, 0, 5, 8]
    assert torch.equal(cache.attention(cuda_library, launch, half, q, rows, 600), y[rows])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "width", "block_tokens"),
    [*((32, 128, n) for n in (1, 7, 16, 32, 256)), (2, 18, 7), (3, 64, 16)],
)
def test_a_step_is_rotation_and_attention(cuda_library, launch, half, dtype, heads, width, block_tokens):
    lengths = [1, 2, 127, 128, 129, 300, 31, 33, 513, 64, 2000, 1025, 1500, 1792]
    lengths += torch.randint(1, 700, (31,)).tolist()
    cache = Cache(dtype, heads, width, block_tokens, lengths)
    qkv = torch.randn(len(lengths), 3 * heads * width, device="cuda").to(HALVES[half])
    angle = torch.randn(2, 2048, width // 2, device="cuda") * 3
    angle_tables = torch.tensor([i % 2 for i in range(len(lengths))], dtype=torch.int32, device="cuda")
    angles = (angle_tables, angle.cos(), angle.sin(), torch.rand(2048, device="cuda") / math.sqrt(width))

    def step(fused, rows, max_keys):
        return cache.step(cuda_library, launch, half, fused, qkv, angles, rows, max_keys)

    all_rows = list(range(len(lengths)))
    y, _ = step(0, all_rows, max(lengths))
    # Launches of few and of many thread blocks, which merge the chunks of keys differently.
    for rows in (all_rows, all_rows[::-1], all_rows[:5], [10], [5], [0]):
        for max_keys in (max(lengths[i] for i in rows), 8000):
            separate, separate_cache = step(0, rows, max_keys)
            fused, fused_cache = step(1, rows, max_keys)
            assert torch.equal(separate, y[rows])
            assert torch.equal(fused, y[rows])
            assert torch.equal(fused_cache, separate_cache)
