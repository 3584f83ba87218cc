"""The same model in PyTorch on a GPU: `python peers.py` prints a line of JSON for each row and execution mode.

eager: PyTorch's operators, one after another.
compiled: torch.compile for the code between two attentions, shared by all layers, and a whole pass as one CUDA graph.
This is equivalent to mode "reduce-overhead", without its copies of inputs and without compiling 32 equal layers one by
one. Decode steps of one token are compiled with coordinate_descent_tuning, which makes them faster.

Weights and activations are bfloat16. q, k, v come from one product, and so do gate and value of the MLP. The cache is
static; attention reads its valid part only, with the kernel of scaled_dot_product_attention that is fastest at the
shape. Steps of a caption have a graph for each length.
"""

from __future__ import annotations

import argparse
import functools
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
IMAGES = 8  # prompts in a batch
CACHED = 2048  # positions of the static cache, and of 64 requests at once
CACHED_REQUESTS = 384


def eager(function: Function) -> Function:
    return function


def compiled(function: Function) -> Function:
    """Compile a function. For one row, products become tuned reductions; else they are cuBLAS's."""
    compiler = functools.partial(torch.compile, function, fullgraph=True, dynamic=False)
    plain, of_one_row = compiler(), compiler(options={"coordinate_descent_tuning": True})

    def call(x: Any, *others: Any) -> Any:
        return (of_one_row if x.dim() == 2 and len(x) == 1 else plain)(x, *others)

    return call


# ---- graphs and attention --------------------------------------------------------------------------------


class Graphs:
    """CUDA graphs of passes that share their scratch memory and run one at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._kept: list[Any] = []

    def capture(self, run: Function) -> Function:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            results = run()
        self._kept.append((graph, results))  # keep the graph, which owns the shared memory, and its results
        return graph.replay


def as_it_is(run: Function) -> Function:
    return run


@functools.cache
def fastest_kernel(query: tuple[int, ...], key: tuple[int, ...], causal: bool) -> SDPBackend:
    """Fastest kernel for shapes [batch, heads, tokens, head_dim], by the time of 10 calls in a graph."""
    q = torch.randn(query[0], query[2], query[1], query[3], device=DEVICE, dtype=torch.bfloat16).transpose(
        1, 2
    )
    k = torch.randn(key[0], key[2], key[1], key[3], device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    times = {}
    for kernel in KERNELS:

        def ten(kernel: SDPBackend = kernel) -> None:
            with sdpa_kernel(kernel):
                for _ in range(10):
                    f.scaled_dot_product_attention(q, k, k, is_causal=causal)

        try:
            times[kernel] = measure(Graphs().capture(ten), least=20) / 10
        except RuntimeError as error:
            note(f"{kernel.name} does not take {query} {key}: {str(error).splitlines()[0]}")
    shown = ", ".join(f"{kernel.name.split('_')[0].lower()} {1e3 * ms:.1f}" for kernel, ms in times.items())
    note(f"attention {query} {key}, us: {shown}")
    return min(times, key=lambda kernel: times[kernel])


def attend(q: Any, k: Any, v: Any, causal: bool = False) -> Any:
    """[batch, tokens, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = -(-k.shape[2] // 256) * 256  # similar lengths share a choice
    key = (*k.shape[:2], k.shape[2] if causal else seen, k.shape[3])
    with sdpa_kernel(fastest_kernel(tuple(q.shape), key, causal)):
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
    """QKV of a layer. x [n, hidden], delta: output of the layer before; keys and values are written to their slots."""
    x = x + delta
    heads, head_dim = keys.shape[1:]
    q, k, v = f.linear(rms(x, ln), weight, bias).view(-1, 3, heads, head_dim).unbind(1)
    keys.index_copy_(0, slots, rotate(k, cos, sin))
    values.index_copy_(0, slots, v)
    return x, rotate(q, cos, sin)


def after_attention(x: Any, mixed: Any, proj: Any, ln: Any, gate_up: Any, down: Any) -> Any:
    x = x + f.linear(mixed, proj)
    value, gate = f.linear(rms(x, ln), gate_up).chunk(2, -1)
    return x, f.linear(value * f.silu(gate), down)


def logits_and_tokens(x: Any, delta: Any, last: Any, ln: Any, head: Any) -> Any:
    logits = f.linear(rms((x + delta)[last], ln), head)
    return logits, logits.argmax(-1)


class Cache:
    """Static KV cache: [batch * length, heads, head_dim] per layer, random at first."""

    def __init__(self, sizes: Sizes, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        shape = (batch * length, sizes.heads, sizes.head_dim)
        kinds = {"device": DEVICE, "dtype": torch.bfloat16}
        self.keys = [torch.randn(shape, **kinds) for _ in range(sizes.layers)]
        self.values = [torch.randn(shape, **kinds) for _ in range(sizes.layers)]


class Language:
    """The language model, eager or compiled."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        w = {name: random(name, shape) for name, shape in language_shapes(sizes).items()}
        self.layers = []
        for i in range(sizes.layers):
            name = f"h.{i}."
            before = [w[name + "ln_1.weight"], w[name + "attn.c_attn.weight"], w[name + "attn.c_attn.bias"]]
            gate_up = torch.cat([w.pop(name + "mlp.w1.weight"), w.pop(name + "mlp.w2.weight")])
            after = [
                *(w[name + "attn.c_proj.weight"], w[name + "ln_2.weight"]),
                *(gate_up, w[name + "mlp.c_proj.weight"]),
            ]
            self.layers.append((before, after))
        self.wte, self.ln_f, self.lm_head = w["wte.weight"], w["ln_f.weight"], w["lm_head.weight"]
        half = torch.arange(0, sizes.head_dim, 2, device=DEVICE, dtype=torch.float64) / sizes.head_dim
        angles = torch.arange(CACHED, device=DEVICE, dtype=torch.float64)[:, None, None] / 10000**half
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.compile_with(eager)

    def compile_with(self, how: Callable[[Function], Function]) -> None:
        self.before, self.after = how(before_attention), how(after_attention)
        self.head = how(logits_and_tokens)

    def run(
        self, cache: Cache, ids: Any, past: int, tokens: int, first: int = 0, features: Any = None
    ) -> tuple[Any, Any]:
        """Run a pass over `tokens` tokens per sequence, for sequences of the cache from `first` on.

        ids int64 [sequences * tokens]; features [sequences, queries, hidden] are positions 1 .. queries.
        Returns logits and next tokens.
        """
        n = ids.shape[0] // tokens
        x = f.embedding(ids, self.wte)
        if features is not None:
            x.view(n, tokens, -1)[:, 1 : 1 + features.shape[1]] = features
        slots, positions, last = places(cache.length, first, n, past, tokens)
        cos, sin = self.cos[positions], self.sin[positions]
        delta = torch.zeros_like(x)
        head_dim = self.sizes.head_dim
        for (before, after), keys, values in zip(self.layers, cache.keys, cache.values):
            x, q = self.before(x, delta, *before, cos, sin, keys, values, slots)
            k, v = (
                c.view(cache.batch, cache.length, -1, head_dim)[first : first + n, : past + tokens]
                for c in (keys, values)
            )
            mixed = attend(q.view(n, tokens, -1, head_dim), k, v, causal=tokens > 1)
            x, delta = self.after(x, mixed.flatten(0, 1), *after)
        return self.head(x, delta, last, self.ln_f, self.lm_head)  # type: ignore[no-any-return]


@functools.cache
def places(length: int, first: int, n: int, past: int, tokens: int) -> tuple[Any, Any, Any]:
    """Cache slots and positions of the tokens, and indices of the last token of each sequence: int64."""
    positions = torch.arange(past, past + tokens, device=DEVICE).repeat(n)
    sequences = torch.arange(first, first + n, device=DEVICE).repeat_interleave(tokens)
    last = torch.arange(1, n + 1, device=DEVICE) * tokens - 1
    return sequences * length + positions, positions, last


# ---- images ----------------------------------------------------------------------------------------------


def norm(x: Any, weight: Any, bias: Any) -> Any:
    return f.layer_norm(x, weight.shape, weight, bias, EPSILON)


def patches(images: Any, conv: Any, positions: Any, ln: Any, ln_bias: Any) -> Any:
    """float32 [n, 3, size, size] -> [n, patches, width]."""
    n, side = images.shape[0], conv.shape[2]
    grid = images.shape[2] // side
    cut = images.view(n, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, -1)
    return norm(f.linear(cut.bfloat16(), conv.flatten(1)) + positions, ln, ln_bias)


def before_seeing(x: Any, delta: Any, ln: Any, ln_bias: Any, weight: Any, bias: Any) -> Any:
    x = x + delta
    return x, f.linear(norm(x, ln, ln_bias), weight, bias)


def after_seeing(
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
    x = x + f.linear(mixed, out, out_bias)
    return x, f.linear(f.gelu(f.linear(norm(x, ln, ln_bias), fc, fc_bias)), proj, bias)


def before_pooling(
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
    x = norm(f.linear(x + delta, kv), ln, ln_bias)
    return f.linear(x + positions, key, key_bias), f.linear(x, value, bias)


def after_pooling(mixed: Any, out: Any, out_bias: Any, ln: Any, ln_bias: Any, proj: Any) -> Any:
    return f.linear(norm(f.linear(mixed, out, out_bias), ln, ln_bias), proj)


class Vision:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        w = {
            name.removeprefix("visual."): random(name, shape) for name, shape in vision_shapes(sizes).items()
        }

        def both(name: str) -> list[Any]:
            return [w[name + ".weight"], w[name + ".bias"]]

        self.front = [w["conv1.weight"], w["positional_embedding"], *both("ln_pre")]
        self.blocks = []
        for i in range(sizes.vision_layers):
            name = f"transformer.resblocks.{i}."
            before = both(name + "ln_1") + both(name + "attn.in_proj")
            after = both(name + "attn.out_proj") + both(name + "ln_2")
            after += both(name + "mlp.c_fc") + both(name + "mlp.c_proj")
            self.blocks.append((before, after))
        query, key, value = w["attn_pool.attn.in_proj_weight"].chunk(3)
        query_bias, key_bias, value_bias = w["attn_pool.attn.in_proj_bias"].chunk(3)
        self.pool = [w["attn_pool.kv_proj.weight"], *both("attn_pool.ln_kv"), w["attn_pool.key_pos_embed"]]
        self.pool += [key, key_bias, value, value_bias]
        queries = norm(w["attn_pool.query"], *both("attn_pool.ln_q")) + w["attn_pool.pos_embed"]
        self.queries = f.linear(queries, query, query_bias)  # the same for every image
        self.back = [*both("attn_pool.attn.out_proj"), *both("ln_post"), w["proj"]]
        self.compile_with(eager)

    def compile_with(self, how: Callable[[Function], Function]) -> None:
        self.cut, self.before, self.after = how(patches), how(before_seeing), how(after_seeing)
        self.before_pool, self.after_pool = how(before_pooling), how(after_pooling)

    def run(self, images: Any) -> Any:
        """float32 [n, 3, size, size] -> bfloat16 [n, queries, hidden]."""
        x = self.cut(images, *self.front)
        delta = torch.zeros_like(x)
        for before, after in self.blocks:
            x, qkv = self.before(x, delta, *before)
            # Layout: [heads][q, k, v][head_dim].
            q, k, v = qkv.unflatten(-1, (self.sizes.vision_heads, 3, -1)).unbind(-2)
            x, delta = self.after(x, attend(q, k, v), *after)
        k, v = self.before_pool(x, delta, *self.pool)
        q = self.queries.expand(len(images), -1, -1)
        q, k, v = (t.unflatten(-1, (-1, POOL_HEAD)) for t in (q, k, v))
        return self.after_pool(attend(q, k, v), *self.back)


# ---- rows ------------------------------------------------------------------------------------------------


def time_vision(column: str, vision: Vision, capture: Function) -> None:
    for n, row in VISION_ROWS.items():
        sets = image_sets(n, vision.sizes)
        images = torch.empty_like(sets[0])
        run = capture(functools.partial(vision.run, images))
        report(column, row, measure(run, fresh(images, sets)))


def fresh(images: Any, sets: list[Any]) -> Callable[[], None]:
    def bring() -> None:
        sets.append(sets.pop(0))
        images.copy_(sets[0])

    return bring


def time_prompts(column: str, vision: Vision, language: Language, capture: Function) -> None:
    cache = Cache(language.sizes, 1, CACHED)
    features = vision.run(image_sets(1, vision.sizes)[0])
    for n, row in PROMPT_ROWS.items():
        ids = random_ids(n, language.sizes).long()
        seen = features if n == PROMPT else None
        run = capture(functools.partial(language.run, cache, ids, 0, n, 0, seen))
        report(column, row, measure(run, lambda ids=ids: ids.random_(0, language.sizes.vocab)))


def time_steps(column: str, language: Language, capture: Function) -> None:
    cache = None
    for batch, past in sorted(STEPS):
        length = CACHED if batch < REQUESTS else CACHED_REQUESTS
        if cache is None or cache.batch != batch:
            del cache
            cache = Cache(language.sizes, batch, length)
        ids = random_ids(batch, language.sizes).long()

        def step(cache: Cache = cache, ids: Any = ids, past: int = past) -> Any:
            logits, tokens = language.run(cache, ids, past, 1)
            return logits, ids.copy_(tokens)

        run = capture(step)
        fill = functools.partial(ids.random_, 0, language.sizes.vocab)
        report(column, step_row(batch, past), measure(run, fill, group=8))


def answer(vision: Vision, language: Language, capture: Function, requests: int) -> Callable[[], Any]:
    """Function that answers `requests` new requests: tokens int64 [NEW_TOKENS, requests] on the host."""
    sizes = language.sizes
    cache = Cache(sizes, requests, CACHED if requests == 1 else CACHED_REQUESTS)
    images = image_sets(requests, sizes)[0]
    prompts = random_ids(requests * PROMPT, sizes).long()
    tokens = torch.zeros(NEW_TOKENS, requests, device=DEVICE, dtype=torch.int64)
    part = min(requests, IMAGES)

    def prefill(first: int, seen: Any, ids: Any) -> None:
        features = vision.run(seen)
        tokens[0, first : first + part] = language.run(cache, ids, 0, PROMPT, first, features)[1]

    def step(i: int) -> None:
        tokens[i] = language.run(cache, tokens[i - 1], PROMPT + i - 1, 1)[1]

    runs = [
        capture(
            functools.partial(
                prefill,
                first,
                images[first : first + part],
                prompts[first * PROMPT : (first + part) * PROMPT],
            )
        )
        for first in range(0, requests, part)
    ]
    runs += [capture(functools.partial(step, i)) for i in range(1, NEW_TOKENS)]

    def everything() -> Any:
        images.normal_()
        prompts.random_(0, sizes.vocab)
        for run in runs:
            run()
        return tokens.cpu()

    return everything


def time_answers(column: str, vision: Vision, language: Language, capture: Function) -> None:
    for requests, row in ((1, CAPTION_ROW), (REQUESTS, REQUESTS_ROW)):
        report(column, row, measure_waiting(answer(vision, language, capture, requests)))


# ---- main ------------------------------------------------------------------------------------------------


def save_check(path: Path, vision: Vision, language: Language) -> None:
    """Save the reference for ours.py --check: an image, a prompt, the image's features and the prompt's logits."""
    torch.manual_seed(1)
    image = image_sets(1, vision.sizes)[0]
    ids = random_ids(PROMPT, language.sizes)
    features = vision.run(image)
    logits, _ = language.run(Cache(language.sizes, 1, CACHED), ids.long(), 0, PROMPT, 0, features)
    torch.save({"image": image, "ids": ids, "features": features.float(), "logits": logits.float()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, help="only write a prompt and its logits to this file")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 64
    sizes = Sizes()
    vision, language = Vision(sizes), Language(sizes)
    if arguments.check:
        save_check(arguments.check, vision, language)
        return
    for column, how, capture in (("eager", eager, as_it_is), ("compiled", compiled, Graphs().capture)):
        for model in (vision, language):
            model.compile_with(how)
        time_steps(column, language, capture)
        time_prompts(column, vision, language, capture)
        time_vision(column, vision, capture)
        time_answers(column, vision, language, capture)


if __name__ == "__main__":
    main()
