"""The 7B model for GPU benchmarks: shapes of its weights, random values, rows of run.py's table with lower bounds.

Needs only PyTorch, neither the plugin nor Paddle.
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
    """Sizes of the model; `mlp` is the number of outputs of w1, and of w2."""

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
    """Shapes of the language model's weights by name, as in csrc/include/qwenvl.h; matrices are [out, in]."""
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
    """Shapes of the vision stage's weights by name, as in csrc/include/qwenvl.h; matrices are [out, in]."""
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
    """Random bfloat16 weight on the device, equal in all processes, with a magnitude that keeps activations small."""
    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    if name == "wte.weight":
        return values
    if len(shape) > 1:
        return values.mul_(0.5 / math.sqrt(math.prod(shape[1:])))
    values.mul_(0.1)
    is_norm_weight = "ln_" in name and name.endswith("weight")
    return values.add_(1) if is_norm_weight else values


# ---- the requests ----------------------------------------------------------------------------------------

PROMPT, LONG_PROMPT = 284, 2000  # tokens; the short prompt has an image at the positions 1 to 256
NEW_TOKENS = 64  # per completion
REQUESTS = 64  # concurrent, in the row REQUESTS_ROW
# Decode steps: (sequences, tokens of each in the KV cache).
STEPS = ((1, 300), (8, 300), (32, 300), (64, 300), (1, 2000), (8, 2000), (32, 2000))
STORAGES = ("bf16", "int8", "int4")


def step_row(batch: int, past: int) -> str:
    return f"decode, batch {batch}, {past} positions"


VISION_ROWS = {n: f"vision, {n} image{'s' if n > 1 else ''}" for n in (1, 8)}
PROMPT_ROWS = {n: f"prefill, {n} tokens" for n in (PROMPT, LONG_PROMPT)}
CAPTION_ROW = f"caption of {NEW_TOKENS} tokens, one image"
REQUESTS_ROW = f"{REQUESTS} requests at once, an image and {NEW_TOKENS} tokens each"
OPEN_ROW = "opening from cached files"
COPY, READ, RATE = "copy, GB/s", "read, GB/s", "products, TFLOP/s"  # limits of the machine


def image_sets(n: int, sizes: Sizes) -> list[Any]:
    """Four sets of n random images, float32 [n, 3, size, size].

    `time_vision` (ours.py, peers.py) uses the sets in turn, so that a set is no longer in the GPU's cache when it is
    used again.
    """
    return [torch.randn(n, 3, sizes.image, sizes.image, device=DEVICE) for _ in range(4)]


def random_ids(n: int, sizes: Sizes) -> Any:
    """Random token ids, int32 [n]."""
    return torch.randint(0, sizes.vocab, (n,), device=DEVICE, dtype=torch.int32)


# ---- lower bounds of the rows ----------------------------------------------------------------------------


class Machine(NamedTuple):
    """Measured limits: bytes read per second (`read`), operations of matrix products per second (`rate`)."""

    read: float
    rate: float


def bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight in the engine's packed layout, as computed by qvl_packed_bytes."""
    n_out, n_in = shape[0], math.prod(shape[1:])
    padded = math.ceil(n_in / 128) * 128  # rows of integers are padded to a multiple of 128
    if kind == "int8":
        return n_out * padded + 4 * n_out
    if kind == "int4_g64":
        return n_out * padded // 2 + 2 * n_out * padded // 64
    return 2 * n_out * n_in


def kind_of(name: str, shape: tuple[int, ...], storage: str) -> str:
    """Storage type of a weight in an export of type `storage`.

    The vision stage, embeddings and vectors are not quantized; "int4" leaves c_attn and lm_head at 8 bits.
    """
    if len(shape) != 2 or name.startswith(("wte", "visual")) or storage == "bf16":
        return "bf16"
    has_8_bits = storage == "int8" or name.endswith(("attn.c_attn.weight", "lm_head.weight"))
    return "int8" if has_8_bits else "int4_g64"


def floors(sizes: Sizes, storage: str, machine: Machine) -> dict[str, float]:
    """Lower bounds of the rows in milliseconds: the larger of bytes / `read` and operations / `rate`.

    Bytes are those of the matrices, without the token embedding, once in each step or pass, and in decode steps also
    those of the keys and values (bfloat16). Operations are those of matrix products and attention; causal attention of
    a prompt needs half of all pairs of positions. For captions and requests the bounds of images, prefill and decode
    steps are added.
    """
    weights = language_shapes(sizes)
    matrices = {name: shape for name, shape in weights.items() if len(shape) == 2 and name != "wte.weight"}
    weight_bytes = sum(bytes_of(kind_of(name, shape, storage), shape) for name, shape in matrices.items())
    layer_values = sum(math.prod(shape) for name, shape in matrices.items() if name != "lm_head.weight")
    head_values = sizes.vocab * sizes.hidden
    # Bytes of the key and value of a position in all layers: two vectors of two bytes per number. Attention needs as
    # many operations for a query and a key: two products of two operations per number.
    position = 4 * sizes.layers * sizes.hidden

    def bound(n_bytes: float, operations: float) -> float:
        return 1e3 * max(n_bytes / machine.read, operations / machine.rate)

    def decode_step(batch: int, past: int) -> float:
        attention = batch * (past + 1) * position
        return bound(weight_bytes + attention, 2 * batch * (layer_values + head_values) + attention)

    def prefill(n_tokens: int, n_prompts: int = 1) -> float:
        passes = math.ceil(n_tokens * n_prompts / 2048)  # of at most 2048 tokens
        products = 2 * n_tokens * layer_values + 2 * head_values
        attention = n_tokens * n_tokens / 2 * position
        return bound(passes * weight_bytes, n_prompts * (products + attention))

    vision = {name: shape for name, shape in vision_shapes(sizes).items() if len(shape) > 1}
    vision_bytes = sum(bytes_of("bf16", shape) for shape in vision.values())
    # Values of the matrices that are applied to each patch: without the resampler's and the positional embedding.
    patch_values = sum(
        math.prod(shape)
        for name, shape in vision.items()
        if "attn_pool" not in name and "positional" not in name
    )
    patch_values -= sizes.hidden**2  # visual.proj is applied to queries, not to patches
    width, hidden, patches, queries = sizes.vision_width, sizes.hidden, sizes.patches, sizes.queries
    vision_attention = sizes.vision_layers * 4 * patches**2 * width
    # kv_proj and the projections of keys and values; attention, the output projection and visual.proj.
    resampler = 2 * patches * (width * hidden + 2 * hidden**2)
    resampler += queries * (4 * patches * hidden + 4 * hidden**2)
    image_operations = 2 * patches * patch_values + vision_attention + resampler

    def encode(n_images: int) -> float:
        passes = math.ceil(n_images / 8)  # of at most eight images
        return bound(passes * vision_bytes, n_images * image_operations)

    # Cached tokens of each decode step of a completion; the first token is computed by the prefill.
    pasts = range(PROMPT, PROMPT + NEW_TOKENS - 1)
    rows = {VISION_ROWS[n]: encode(n) for n in VISION_ROWS}
    rows |= {PROMPT_ROWS[n]: prefill(n) for n in PROMPT_ROWS}
    rows |= {step_row(batch, past): decode_step(batch, past) for batch, past in STEPS}
    rows[CAPTION_ROW] = encode(1) + prefill(PROMPT) + sum(decode_step(1, past) for past in pasts)
    decode = sum(decode_step(REQUESTS, past) for past in pasts)
    rows[REQUESTS_ROW] = encode(REQUESTS) + prefill(PROMPT, REQUESTS) + decode
    return rows
