"""The part of run.py that measures PyTorch: prints a line of JSON for each row and execution mode.

eager: PyTorch's operators, one after another.
compiled: torch.compile for the operations between two attention calls, shared by all layers, and one CUDA graph per
pass. Compared with PyTorch's mode "reduce-overhead", this saves the copies of inputs to a graph, and compiles the 32
equal layers once instead of one by one. Decode steps of one sequence are compiled with coordinate_descent_tuning, which
makes them faster.

Weights and activations are bfloat16. One product computes q, k and v, and one the gate and value of the MLP. The KV
cache is static; attention reads only its valid part, with the kernel of scaled_dot_product_attention that is fastest
for the shape. Each decode step of a completion has a separate graph, since the number of cached tokens is constant in a
graph.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import (
    CAPTION_ROW,
    DEVICE,
    EPSILON,
    NEW_TOKENS,
    POOL_HEAD,
    PROMPT,
    PROMPT_ROWS,
    REQUESTS,
    REQUESTS_ROW,
    STEPS,
    VISION_ROWS,
    Sizes,
    image_sets,
    language_shapes,
    random,
    random_ids,
    step_row,
    vision_shapes,
)
from timing import measure, measure_waiting, note, report
from torch.nn import functional as f
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[..., Any]
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
PREFILL_BATCH = 8  # requests whose images and prompts are computed in one pass
# Positions of the static cache per sequence: in general, and with 64 concurrent requests, which need at most 348 (a
# prompt of 284 tokens, and 64 new ones).
CACHE_LENGTH = 2048
CACHE_LENGTH_REQUESTS = 384


def eager(function: Function) -> Function:
    return function


def compiled(function: Function) -> Function:
    """Compile a function twice, and choose by the number of rows of its first argument.

    With one row (a decode step of one sequence), matrix products are compiled to tuned reductions; otherwise they call
    cuBLAS.
    """
    compiler = functools.partial(torch.compile, function, fullgraph=True, dynamic=False)
    for_many_rows, for_one_row = compiler(), compiler(options={"coordinate_descent_tuning": True})

    def call(x: Any, *arguments: Any) -> Any:
        has_one_row = x.dim() == 2 and len(x) == 1
        return (for_one_row if has_one_row else for_many_rows)(x, *arguments)

    return call


# ---- graphs and attention --------------------------------------------------------------------------------


class Graphs:
    """CUDA graphs of passes that run one at a time and share their scratch memory."""

    def __init__(self) -> None:
        self._memory_pool = torch.cuda.graph_pool_handle()
        self._graphs: list[Any] = []  # with their results: keeps the memory pool and the results alive

    def capture(self, run: Function) -> Function:
        """Return a function that replays a graph of `run`, after two warm-up runs on another stream.

        The warm-up runs also fill the caches of fastest_kernel, which measures, and of token_indices: neither may
        happen during the capture.
        """
        warm_up_stream = torch.cuda.Stream()
        warm_up_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up_stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(warm_up_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            results = run()
        self._graphs.append((graph, results))
        return graph.replay


def without_graph(run: Function) -> Function:
    return run


@functools.cache
def fastest_kernel(query: tuple[int, ...], key: tuple[int, ...], causal: bool) -> SDPBackend:
    """Fastest kernel for shapes [batch, heads, tokens, head_dim], by the time of 10 calls in a CUDA graph."""

    def values(shape: tuple[int, ...]) -> Any:
        """Random values whose layout in memory is [batch, tokens, heads, head_dim]."""
        batch, heads, tokens, head_dim = shape
        x = torch.randn(batch, tokens, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        return x.transpose(1, 2)

    q, k = values(query), values(key)
    times = {}
    for kernel in KERNELS:

        def call_10_times(kernel: SDPBackend = kernel) -> None:
            with sdpa_kernel(kernel):
                for _ in range(10):
                    f.scaled_dot_product_attention(q, k, k, is_causal=causal)

        try:
            times[kernel] = measure(Graphs().capture(call_10_times), minimum=20) / 10
        except RuntimeError as error:
            note(f"{kernel.name} does not support {query} {key}: {str(error).splitlines()[0]}")
    results = ", ".join(f"{kernel.name.split('_')[0].lower()} {1e3 * ms:.1f}" for kernel, ms in times.items())
    note(f"attention {query} {key}, us: {results}")
    return min(times, key=lambda kernel: times[kernel])


def attend(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    """Attention: q, k and v [batch, tokens, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    batch, heads, length, head_dim = k.shape
    # Without a causal mask, lengths that round up to the same multiple of 256 share the choice of a kernel.
    measured_length = length if causal else math.ceil(length / 256) * 256
    with sdpa_kernel(fastest_kernel(tuple(q.shape), (batch, heads, measured_length, head_dim), causal)):
        mixed = f.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


# ---- the language model ----------------------------------------------------------------------------------


def rms(x: Any, weight: Any) -> Any:
    return f.rms_norm(x, weight.shape, weight, EPSILON)


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def before_attention(
    x: Any,
    delta: Any,
    ln: Any,
    weight: Any,
    bias: Any,
    cos: Any,
    sin: Any,
    keys: Any,
    values: Any,
    slots: Any,
) -> Any:
    """First part of a layer: norm, product for q, k and v, rotary embedding.

    x, delta [n, hidden]: residual stream, and the output of the previous layer's MLP, which is to be added to it.
    Writes the keys and values to their slots of the cache; returns the residual stream and the queries.
    """
    x = x + delta
    heads, head_dim = keys.shape[1:]
    q, k, v = f.linear(rms(x, ln), weight, bias).view(-1, 3, heads, head_dim).unbind(1)
    keys.index_copy_(0, slots, rotate(k, cos, sin))
    values.index_copy_(0, slots, v)
    return x, rotate(q, cos, sin)


def after_attention(x: Any, mixed: Any, proj: Any, ln: Any, value_and_gate: Any, down: Any) -> Any:
    """Second part of a layer: output projection of the attention, norm, MLP.

    Returns the residual stream and the MLP's output.
    """
    x = x + f.linear(mixed, proj)
    value, gate = f.linear(rms(x, ln), value_and_gate).chunk(2, -1)
    return x, f.linear(value * f.silu(gate), down)


def logits_and_tokens(x: Any, delta: Any, last: Any, ln: Any, head: Any) -> Any:
    logits = f.linear(rms((x + delta)[last], ln), head)
    return logits, logits.argmax(-1)


class Cache:
    """Static KV cache: keys and values [batch * length, heads, head_dim] of each layer.

    The initial values are random, since decode steps are timed without a prefill.
    """

    def __init__(self, sizes: Sizes, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        shape = (batch * length, sizes.heads, sizes.head_dim)
        options = {"device": DEVICE, "dtype": torch.bfloat16}
        self.keys = [torch.randn(shape, **options) for _ in range(sizes.layers)]
        self.values = [torch.randn(shape, **options) for _ in range(sizes.layers)]


class Language:
    """The language model, eager or compiled."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        w = {name: random(name, shape) for name, shape in language_shapes(sizes).items()}
        self.layers = []
        for i in range(sizes.layers):
            name = f"h.{i}."
            before = [w[name + "ln_1.weight"], w[name + "attn.c_attn.weight"], w[name + "attn.c_attn.bias"]]
            value_and_gate = torch.cat([w.pop(name + "mlp.w1.weight"), w.pop(name + "mlp.w2.weight")])
            after = [
                *(w[name + "attn.c_proj.weight"], w[name + "ln_2.weight"]),
                *(value_and_gate, w[name + "mlp.c_proj.weight"]),
            ]
            self.layers.append((before, after))
        self.wte, self.ln_f, self.lm_head = w["wte.weight"], w["ln_f.weight"], w["lm_head.weight"]
        exponents = torch.arange(0, sizes.head_dim, 2, device=DEVICE, dtype=torch.float64) / sizes.head_dim
        positions = torch.arange(CACHE_LENGTH, device=DEVICE, dtype=torch.float64)
        angles = positions[:, None, None] / 10000**exponents
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.compile_with(eager)

    def compile_with(self, compiler: Callable[[Function], Function]) -> None:
        self.before, self.after = compiler(before_attention), compiler(after_attention)
        self.head = compiler(logits_and_tokens)

    def run(
        self, cache: Cache, ids: Any, past: int, tokens: int, first: int = 0, features: Any = None
    ) -> tuple[Any, Any]:
        """Run a pass for consecutive sequences of the cache; return logits and next tokens of each sequence.

        Args:
            ids: int64 [sequences * tokens].
            past: number of cached tokens of each sequence; 0 if tokens > 1, since the causal mask begins at the first
                key.
            tokens: number of new tokens of each sequence.
            first: index of the first sequence in the cache.
            features: image features at positions 1 to queries of each sequence, [sequences, queries, hidden].
        """
        n = ids.shape[0] // tokens
        x = f.embedding(ids, self.wte)
        if features is not None:
            x.view(n, tokens, -1)[:, 1 : 1 + features.shape[1]] = features
        slots, positions, last = token_indices(cache.length, first, n, past, tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        delta = torch.zeros_like(x)
        head_dim = self.sizes.head_dim
        for (before_weights, after_weights), keys, values in zip(self.layers, cache.keys, cache.values):
            x, q = self.before(x, delta, *before_weights, cos, sin, keys, values, slots)
            k, v = (
                cached.view(cache.batch, cache.length, -1, head_dim)[first : first + n, : past + tokens]
                for cached in (keys, values)
            )
            mixed = attend(q.view(n, tokens, -1, head_dim), k, v, causal=tokens > 1)
            x, delta = self.after(x, mixed.flatten(0, 1), *after_weights)
        return self.head(x, delta, last, self.ln_f, self.lm_head)  # type: ignore[no-any-return]


@functools.cache
def token_indices(length: int, first: int, n: int, past: int, tokens: int) -> tuple[Any, Any, Any]:
    """Cache slot and position of each token, and index of the last token of each sequence, int64.

    The arguments are those of Language.run, for n sequences and a cache of `length` positions per sequence.
    """
    positions = torch.arange(past, past + tokens, device=DEVICE).repeat(n)
    sequences = torch.arange(first, first + n, device=DEVICE).repeat_interleave(tokens)
    last = torch.arange(1, n + 1, device=DEVICE) * tokens - 1
    return sequences * length + positions, positions, last


# ---- images ----------------------------------------------------------------------------------------------


def norm(x: Any, weight: Any, bias: Any) -> Any:
    return f.layer_norm(x, weight.shape, weight, bias, EPSILON)


def patches(images: Any, conv: Any, positions: Any, ln: Any, ln_bias: Any) -> Any:
    """Embed patches: images float32 [n, 3, size, size] -> [n, patches, width]."""
    n, side = images.shape[0], conv.shape[2]
    grid = images.shape[2] // side
    pixels = images.view(n, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    pixels = pixels.reshape(n, grid * grid, -1)
    return norm(f.linear(pixels.bfloat16(), conv.flatten(1)) + positions, ln, ln_bias)


def before_vision_attention(x: Any, delta: Any, ln: Any, ln_bias: Any, weight: Any, bias: Any) -> Any:
    """First part of a block, like before_attention: returns the residual stream, and q, k and v of each head."""
    x = x + delta
    return x, f.linear(norm(x, ln, ln_bias), weight, bias)


def after_vision_attention(
    x: Any,
    mixed: Any,
    out: Any,
    out_bias: Any,
    ln: Any,
    ln_bias: Any,
    fc: Any,
    fc_bias: Any,
    proj: Any,
    bias: Any,
) -> Any:
    """Second part of a block, like after_attention: returns the residual stream and the MLP's output."""
    x = x + f.linear(mixed, out, out_bias)
    return x, f.linear(f.gelu(f.linear(norm(x, ln, ln_bias), fc, fc_bias)), proj, bias)


def before_resampler_attention(
    x: Any,
    delta: Any,
    kv: Any,
    ln: Any,
    ln_bias: Any,
    positions: Any,
    key: Any,
    key_bias: Any,
    value: Any,
    bias: Any,
) -> Any:
    """Compute the resampler's keys and values from the patches."""
    x = norm(f.linear(x + delta, kv), ln, ln_bias)
    return f.linear(x + positions, key, key_bias), f.linear(x, value, bias)


def after_resampler_attention(mixed: Any, out: Any, out_bias: Any, ln: Any, ln_bias: Any, proj: Any) -> Any:
    """Compute the image features from the resampler's attention."""
    return f.linear(norm(f.linear(mixed, out, out_bias), ln, ln_bias), proj)


class Vision:
    """The vision stage, eager or compiled."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        w = {
            name.removeprefix("visual."): random(name, shape) for name, shape in vision_shapes(sizes).items()
        }

        def weight_and_bias(name: str) -> list[Any]:
            return [w[name + ".weight"], w[name + ".bias"]]

        self.patch_weights = [w["conv1.weight"], w["positional_embedding"], *weight_and_bias("ln_pre")]
        self.blocks = []
        for i in range(sizes.vision_layers):
            name = f"transformer.resblocks.{i}."
            before = weight_and_bias(name + "ln_1") + weight_and_bias(name + "attn.in_proj")
            after = weight_and_bias(name + "attn.out_proj") + weight_and_bias(name + "ln_2")
            after += weight_and_bias(name + "mlp.c_fc") + weight_and_bias(name + "mlp.c_proj")
            self.blocks.append((before, after))
        query, key, value = w["attn_pool.attn.in_proj_weight"].chunk(3)
        query_bias, key_bias, value_bias = w["attn_pool.attn.in_proj_bias"].chunk(3)
        self.before_resampler_weights = [
            *(
                w["attn_pool.kv_proj.weight"],
                *weight_and_bias("attn_pool.ln_kv"),
                w["attn_pool.key_pos_embed"],
            ),
            *(key, key_bias, value, value_bias),
        ]
        queries = norm(w["attn_pool.query"], *weight_and_bias("attn_pool.ln_q")) + w["attn_pool.pos_embed"]
        self.queries = f.linear(queries, query, query_bias)  # the same for every image
        self.after_resampler_weights = [
            *weight_and_bias("attn_pool.attn.out_proj"),
            *weight_and_bias("ln_post"),
            w["proj"],
        ]
        self.compile_with(eager)

    def compile_with(self, compiler: Callable[[Function], Function]) -> None:
        self.patches = compiler(patches)
        self.before, self.after = compiler(before_vision_attention), compiler(after_vision_attention)
        self.before_resampler = compiler(before_resampler_attention)
        self.after_resampler = compiler(after_resampler_attention)

    def run(self, images: Any) -> Any:
        """Compute features: images float32 [n, 3, size, size] -> bfloat16 [n, queries, hidden]."""
        x = self.patches(images, *self.patch_weights)
        delta = torch.zeros_like(x)
        for before_weights, after_weights in self.blocks:
            x, qkv = self.before(x, delta, *before_weights)
            # Layout of a row: [heads][q, k, v][head_dim].
            q, k, v = qkv.unflatten(-1, (self.sizes.vision_heads, 3, -1)).unbind(-2)
            x, delta = self.after(x, attend(q, k, v), *after_weights)
        k, v = self.before_resampler(x, delta, *self.before_resampler_weights)
        q = self.queries.expand(len(images), -1, -1)
        q, k, v = (x.unflatten(-1, (-1, POOL_HEAD)) for x in (q, k, v))
        return self.after_resampler(attend(q, k, v), *self.after_resampler_weights)


# ---- rows ------------------------------------------------------------------------------------------------


def time_vision(column: str, vision: Vision, capture: Function) -> None:
    for n, row in VISION_ROWS.items():
        sets = image_sets(n, vision.sizes)
        images = torch.empty_like(sets[0])
        run = capture(functools.partial(vision.run, images))

        def copy_next_set(images: Any = images, sets: list[Any] = sets) -> None:
            sets.append(sets.pop(0))
            images.copy_(sets[0])

        report(column, row, measure(run, copy_next_set))


def time_prompts(column: str, vision: Vision, language: Language, capture: Function) -> None:
    cache = Cache(language.sizes, 1, CACHE_LENGTH)
    features = vision.run(image_sets(1, vision.sizes)[0])
    for n, row in PROMPT_ROWS.items():
        ids = random_ids(n, language.sizes).long()
        image_features = features if n == PROMPT else None  # the long prompt has no image
        run = capture(functools.partial(language.run, cache, ids, past=0, tokens=n, features=image_features))
        report(column, row, measure(run, lambda ids=ids: ids.random_(0, language.sizes.vocab)))


def time_steps(column: str, language: Language, capture: Function) -> None:
    cache = None
    for batch, past in sorted(STEPS):
        length = CACHE_LENGTH if batch < REQUESTS else CACHE_LENGTH_REQUESTS
        if cache is None or cache.batch != batch:
            cache = None  # frees its memory before the next is allocated
            cache = Cache(language.sizes, batch, length)
        report(column, step_row(batch, past), measure_step(language, capture, cache, past))


def measure_step(language: Language, capture: Function, cache: Cache, past: int) -> float:
    """Measure a decode step of all sequences of the cache; no reference to the cache is kept."""
    ids = random_ids(cache.batch, language.sizes).long()

    def step() -> Any:
        logits, tokens = language.run(cache, ids, past, tokens=1)
        return logits, ids.copy_(tokens)

    fill = functools.partial(ids.random_, 0, language.sizes.vocab)
    return measure(capture(step), fill, group=8)


def make_answer(vision: Vision, language: Language, capture: Function, n: int) -> Callable[[], Any]:
    """Return a function that answers n new requests and returns their tokens, int64 [NEW_TOKENS, n] on the host."""
    sizes = language.sizes
    cache = Cache(sizes, n, CACHE_LENGTH if n == 1 else CACHE_LENGTH_REQUESTS)
    images = image_sets(n, sizes)[0]
    prompts = random_ids(n * PROMPT, sizes).long()
    tokens = torch.zeros(NEW_TOKENS, n, device=DEVICE, dtype=torch.int64)
    batch = min(n, PREFILL_BATCH)

    def prefill(first: int) -> None:
        """Compute images and prompts of the requests from `first` on."""
        end = first + batch
        features = vision.run(images[first:end])
        ids = prompts[first * PROMPT : end * PROMPT]
        _, tokens[0, first:end] = language.run(
            cache, ids, past=0, tokens=PROMPT, first=first, features=features
        )

    def decode_step(i: int) -> None:
        _, tokens[i] = language.run(cache, tokens[i - 1], past=PROMPT + i - 1, tokens=1)

    passes = [capture(functools.partial(prefill, first)) for first in range(0, n, batch)]
    passes += [capture(functools.partial(decode_step, i)) for i in range(1, NEW_TOKENS)]

    def answer() -> Any:
        images.normal_()
        prompts.random_(0, sizes.vocab)
        for run_pass in passes:
            run_pass()
        return tokens.cpu()

    return answer


def time_answers(column: str, vision: Vision, language: Language, capture: Function) -> None:
    for n, row in ((1, CAPTION_ROW), (REQUESTS, REQUESTS_ROW)):
        report(column, row, measure_waiting(make_answer(vision, language, capture, n)))


# ---- main ------------------------------------------------------------------------------------------------


def save_check(path: Path, vision: Vision, language: Language) -> None:
    """Save the reference of ours.py --check: an image, a prompt, the image's features and the prompt's logits."""
    torch.manual_seed(1)
    image = image_sets(1, vision.sizes)[0]
    ids = random_ids(PROMPT, language.sizes)
    features = vision.run(image)
    cache = Cache(language.sizes, batch=1, length=CACHE_LENGTH)
    logits, _ = language.run(cache, ids.long(), past=0, tokens=PROMPT, features=features)
    torch.save({"image": image, "ids": ids, "features": features.float(), "logits": logits.float()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, help="only write the reference of ours.py --check to this file")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64  # each shape of the table is compiled
    sizes = Sizes()
    vision, language = Vision(sizes), Language(sizes)
    if arguments.check:
        save_check(arguments.check, vision, language)
        return
    modes = (("eager", eager, without_graph), ("compiled", compiled, Graphs().capture))
    for column, compiler, capture in modes:
        for model in (vision, language):
            model.compile_with(compiler)
        time_steps(column, language, capture)
        time_prompts(column, vision, language, capture)
        time_vision(column, vision, capture)
        time_answers(column, vision, language, capture)


if __name__ == "__main__":
    main()
