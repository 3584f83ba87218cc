"""The 7B model on a GPU: names and shapes of its weights, random values, and the lower bound of each row's time.

PyTorch and NumPy only, no plugin: the GPU machine does not need Paddle.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import torch

DEVICE = "cuda"
EPSILON = 1e-6
POOL_HEAD = 128  # head_dim of the resampler


class Sizes(NamedTuple):
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 11008
    vocab: int = 151936
    image: int = 448
    patch: int = 14
    vision_width: int = 1664
    vision_layers: int = 48
    vision_heads: int = 16
    vision_mlp: int = 8192
    queries: int = 256

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# ---- weights ---------------------------------------------------------------------------------------------


def language_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names as in csrc/include/qwenvl.h; matrices [out, in]."""
    hidden, mlp = sizes.hidden, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (sizes.vocab, hidden)}
    for i in range(sizes.layers):
        layer = f"h.{i}."
        shapes[layer + "ln_1.weight"] = (hidden,)
        shapes[layer + "attn.c_attn.weight"] = (3 * hidden, hidden)
        shapes[layer + "attn.c_attn.bias"] = (3 * hidden,)
        shapes[layer + "attn.c_proj.weight"] = (hidden, hidden)
        shapes[layer + "ln_2.weight"] = (hidden,)
        shapes[layer + "mlp.w1.weight"] = (mlp, hidden)
        shapes[layer + "mlp.w2.weight"] = (mlp, hidden)
        shapes[layer + "mlp.c_proj.weight"] = (hidden, mlp)
    shapes["ln_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (sizes.vocab, hidden)
    return shapes


def vision_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    width, hidden, mlp = sizes.vision_width, sizes.hidden, sizes.vision_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (width, 3, sizes.patch, sizes.patch),
        "visual.positional_embedding": (sizes.patches, width),
    }

    def norm(name: str, n: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (n,), (n,)

    def linear(name: str, n_out: int, n_in: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (n_out, n_in), (n_out,)

    norm("visual.ln_pre", width)
    for i in range(sizes.vision_layers):
        block = f"visual.transformer.resblocks.{i}."
        norm(block + "ln_1", width)
        linear(block + "attn.in_proj", 3 * width, width)
        linear(block + "attn.out_proj", width, width)
        norm(block + "ln_2", width)
        linear(block + "mlp.c_fc", mlp, width)
        linear(block + "mlp.c_proj", width, mlp)
    pool = "visual.attn_pool."
    shapes[pool + "kv_proj.weight"] = (hidden, width)
    norm(pool + "ln_kv", hidden)
    shapes[pool + "query"] = (sizes.queries, hidden)
    norm(pool + "ln_q", hidden)
    shapes[pool + "pos_embed"] = (sizes.queries, hidden)
    shapes[pool + "key_pos_embed"] = (sizes.patches, hidden)
    shapes[pool + "attn.in_proj_weight"] = (3 * hidden, hidden)
    shapes[pool + "attn.in_proj_bias"] = (3 * hidden,)
    linear(pool + "attn.out_proj", hidden, hidden)
    norm("visual.ln_post", hidden)
    shapes["visual.proj"] = (hidden, hidden)
    return shapes


def random(name: str, shape: tuple[int, ...]) -> Any:
    """Random bfloat16 values on the device, the same for a name in every process; they keep activations small."""
    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    if len(shape) > 1:
        return values if name == "wte.weight" else values.mul_(0.5 / math.sqrt(math.prod(shape[1:])))
    values.mul_(0.1)
    return values.add_(1) if "ln_" in name and name.endswith("weight") else values


# ---- the requests ----------------------------------------------------------------------------------------

PROMPT, LONG_PROMPT = 284, 2000  # tokens; the short one has an image at 1 .. queries
NEW_TOKENS = 64
REQUESTS = 64
STEPS = ((1, 300), (8, 300), (32, 300), (64, 300), (1, 2000), (8, 2000), (32, 2000))
STORAGES = ("bf16", "int8", "int4")


def step_row(batch: int, past: int) -> str:
    return f"decode, batch {batch}, {past} positions"


VISION_ROWS = {n: f"vision, {n} image{'s' if n > 1 else ''}" for n in (1, 8)}
PROMPT_ROWS = {n: f"prefill, {n} tokens" for n in (PROMPT, LONG_PROMPT)}
CAPTION_ROW = f"caption of {NEW_TOKENS} tokens, one image"
REQUESTS_ROW = f"{REQUESTS} requests at once, an image and {NEW_TOKENS} tokens each"
OPEN_ROW = "opening from cached files"
COPY, READ, RATE = "copy, GB/s", "read, GB/s", "products, TFLOP/s"  # of the machine


def image_sets(n: int, sizes: Sizes) -> list[Any]:
    """Images of variance 1, float32 [n, 3, size, size]: several sets, so that the next one is in no cache."""
    return [torch.randn(n, 3, sizes.image, sizes.image, device=DEVICE) for _ in range(4)]


def random_ids(n: int, sizes: Sizes) -> Any:
    """Random token ids, int32 [n]."""
    return torch.randint(0, sizes.vocab, (n,), device=DEVICE, dtype=torch.int32)


# ---- lower bounds of the rows ----------------------------------------------------------------------------


class Machine(NamedTuple):
    """Measured limits: bytes read per second, operations of matrix products per second."""

    read: float
    rate: float


def bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight, see qvl_packed_bytes."""
    n_out, n_in = shape[0], math.prod(shape[1:])
    padded = -(-n_in // 128) * 128
    if kind == "int8":
        return n_out * padded + 4 * n_out
    if kind == "int4_g64":
        return n_out * padded // 2 + 2 * n_out * padded // 64
    return 2 * n_out * n_in


def kind_of(name: str, shape: tuple[int, ...], storage: str) -> str:
    """Storage type of a weight in an export: "int4" keeps two matrices at 8 bits, and tables unquantized."""
    if len(shape) != 2 or name.startswith(("wte", "visual")) or storage == "bf16":
        return "bf16"
    eight = storage == "int8" or name.endswith(("attn.c_attn.weight", "lm_head.weight"))
    return "int8" if eight else "int4_g64"


def floors(sizes: Sizes, storage: str, machine: Machine) -> dict[str, float]:
    """Lower bounds of the rows in milliseconds: the larger of bytes / `read` and operations / `rate`.

    Bytes are those of the weights and of the cached keys and values (bfloat16), once a step or pass; operations are
    those of the products and of attention, where a prompt's is half a square. Rows of several parts are their sums.
    """
    weights = language_shapes(sizes)
    matrices = {name: shape for name, shape in weights.items() if len(shape) == 2 and name != "wte.weight"}
    read = sum(bytes_of(kind_of(name, shape, storage), shape) for name, shape in matrices.items())
    values = sum(math.prod(shape) for name, shape in matrices.items() if name != "lm_head.weight")
    head = sizes.vocab * sizes.hidden
    position = (
        4 * sizes.layers * sizes.hidden
    )  # bytes of its keys and values; operations for a query and key too

    def longer(n_bytes: float, operations: float) -> float:
        return 1e3 * max(n_bytes / machine.read, operations / machine.rate)

    def step(batch: int, past: int) -> float:
        seen = batch * (past + 1) * position
        return longer(read + seen, 2 * batch * (values + head) + seen)

    def prompt(n: int, prompts: int = 1) -> float:
        passes = -(-n * prompts // 2048)
        return longer(passes * read, prompts * (2 * n * values + 2 * head + n * n / 2 * position))

    vision = {name: shape for name, shape in vision_shapes(sizes).items() if "attn_pool" not in name}
    blocks = sum(
        math.prod(shape) for name, shape in vision.items() if len(shape) > 1 and "positional" not in name
    )
    blocks -= sizes.hidden**2  # visual.proj, applied to queries, not patches
    width, hidden, patches, queries = sizes.vision_width, sizes.hidden, sizes.patches, sizes.queries
    pooling = 2 * patches * (width * hidden + 2 * hidden**2) + queries * (
        4 * patches * hidden + 4 * hidden**2
    )
    image = 2 * patches * blocks + sizes.vision_layers * 4 * patches**2 * width + pooling
    sight = sum(bytes_of("bf16", shape) for shape in vision_shapes(sizes).values() if len(shape) > 1)

    def see(n: int) -> float:
        return longer(-(-n // 8) * sight, n * image)

    later = range(PROMPT, PROMPT + NEW_TOKENS - 1)
    rows = {VISION_ROWS[n]: see(n) for n in VISION_ROWS}
    rows |= {PROMPT_ROWS[n]: prompt(n) for n in PROMPT_ROWS}
    rows |= {step_row(batch, past): step(batch, past) for batch, past in STEPS}
    rows[CAPTION_ROW] = see(1) + prompt(PROMPT) + sum(step(1, past) for past in later)
    rows[REQUESTS_ROW] = (
        see(REQUESTS) + prompt(PROMPT, REQUESTS) + sum(step(REQUESTS, past) for past in later)
    )
    return rows
