"""Times of other implementations per layer of the 7B geometry; cpu_engine.py runs this script.

python benchmarks/cpu_peers.py torch|llama|paddle THREADS SECONDS measures each figure for about SECONDS, and prints a
line of JSON for each variant: its name and milliseconds per layer. torch needs PyTorch. llama needs NumPy, gguf,
llama-cpp-python and 1 GB of disk for a file of random weights. paddle is the portable graph in Paddle Inference, and
needs this package and 3 GB of memory and of disk.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_weights import write_gguf

HIDDEN, HEADS, MLP = 4096, 32, 11008
WIDTH, VISION_HEADS, VISION_MLP, PATCHES = 1664, 16, 8192, 1024
# Tokens of the prompt, tokens before a decode step, and sequences of a batch.
PROMPT, PAST, BATCH = 300, 300, 8


def best(run: Callable[[], object], seconds: float) -> float:
    """Time of the fastest run within `seconds`, in milliseconds."""
    run()  # warm-up
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e3


def report(name: str, **milliseconds: float) -> None:
    print(json.dumps({"name": name, **milliseconds}), flush=True)


# ---- PyTorch ---------------------------------------------------------------------------------------------


def torch_peer(threads: int, seconds: float) -> None:
    import torch
    from torch.nn import functional as f

    torch.set_num_threads(threads)

    def attend(q: Any, k: Any, v: Any, n_heads: int, causal: bool) -> Any:
        n, tokens, _ = q.shape
        q, k, v = (x.view(n, x.shape[1], n_heads, -1).transpose(1, 2) for x in (q, k, v))
        mixed = f.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return mixed.transpose(1, 2).reshape(n, tokens, -1)

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        """Rotary embedding of x [n, tokens, hidden]."""
        n, tokens, width = x.shape
        heads = x.view(n, tokens, HEADS, -1)
        low, high = heads.chunk(2, -1)
        return (heads * cos + torch.cat([-high, low], -1) * sin).view(n, tokens, width)

    class Layer(torch.nn.Module):  # type: ignore[misc]
        """Decoder layer."""

        def __init__(self) -> None:
            super().__init__()
            linear = torch.nn.Linear
            self.ln_1, self.ln_2 = torch.nn.RMSNorm(HIDDEN), torch.nn.RMSNorm(HIDDEN)
            self.c_attn, self.c_proj = linear(HIDDEN, 3 * HIDDEN), linear(HIDDEN, HIDDEN, bias=False)
            self.w1, self.w2 = linear(HIDDEN, MLP, bias=False), linear(HIDDEN, MLP, bias=False)
            self.down = linear(MLP, HIDDEN, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any, past: Any) -> Any:
            q, k, v = self.c_attn(self.ln_1(x)).chunk(3, -1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if past is not None:  # a decode step; the new token has the last position of the cache
                past_keys, past_values = past
                past_keys[:, -1:], past_values[:, -1:] = k, v
                k, v = past
            x = x + self.c_proj(attend(q, k, v, HEADS, causal=past is None))
            normed = self.ln_2(x)
            return x + self.down(self.w1(normed) * f.silu(self.w2(normed)))

    class Block(torch.nn.Module):  # type: ignore[misc]
        """Block of the vision tower."""

        def __init__(self) -> None:
            super().__init__()
            linear = torch.nn.Linear
            self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
            self.in_proj, self.out_proj = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
            self.c_fc, self.c_proj = linear(WIDTH, VISION_MLP), linear(VISION_MLP, WIDTH)

        def forward(self, x: Any) -> Any:
            q, k, v = self.in_proj(self.ln_1(x)).chunk(3, -1)
            x = x + self.out_proj(attend(q, k, v, VISION_HEADS, causal=False))
            return x + self.c_proj(f.gelu(self.c_fc(self.ln_2(x))))

    for dtype in (torch.bfloat16, torch.float32):
        name = f"PyTorch {str(dtype).split('.')[1]}"
        with torch.inference_mode():
            layer, block = Layer().to(dtype), Block().to(dtype)
            past = [torch.randn(BATCH, PAST + 1, HIDDEN).to(dtype) for _ in range(2)]
            x = torch.randn(BATCH, PROMPT, HIDDEN).to(dtype)
            # The values do not matter for the time.
            cos = sin = torch.randn(PROMPT, 1, HIDDEN // HEADS).to(dtype)
            patches = torch.randn(1, PATCHES, WIDTH).to(dtype)
            for compiled in (False, True):
                run_layer, run_block = layer, block
                if compiled:
                    run_layer, run_block = torch.compile(layer), torch.compile(block)
                prompt_inputs = x[:1], cos, sin, None
                decode_inputs = {
                    n: (x[:n, :1], cos[:1], sin[:1], [keys_or_values[:n] for keys_or_values in past])
                    for n in (1, BATCH)
                }
                report(
                    name + (", compiled" if compiled else ""),
                    decode_1=best(functools.partial(run_layer, *decode_inputs[1]), seconds),
                    decode_8=best(functools.partial(run_layer, *decode_inputs[BATCH]), seconds),
                    prefill=best(functools.partial(run_layer, *prompt_inputs), seconds),
                    vision=best(functools.partial(run_block, patches), seconds),
                )
            if dtype == torch.bfloat16:  # matrix products only, computed by oneDNN

                def products(linears: list[Any], n_rows: int) -> float:
                    """Total time of the products with n_rows rows, in milliseconds."""
                    total = 0.0
                    for linear in linears:
                        inputs = torch.randn(n_rows, linear.in_features).to(torch.bfloat16)
                        total += best(functools.partial(linear, inputs), seconds / 4)
                    return total

                report(
                    "oneDNN bfloat16",
                    prefill=products([layer.c_attn, layer.c_proj, layer.w1, layer.w2, layer.down], PROMPT),
                    vision=products([block.in_proj, block.out_proj, block.c_fc, block.c_proj], PATCHES),
                )


# ---- llama.cpp -------------------------------------------------------------------------------------------

LAYERS = 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * MLP,  # Qwen counts w1 and w2 together
    "kv_channels": HIDDEN // HEADS,
    "max_position_embeddings": 8192,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": 64,  # small: lm_head is not part of a layer
}


def llama_peer(threads: int, seconds: float) -> None:
    import llama_cpp

    no_log = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(no_log, None)
    llama_cpp.llama_backend_init()
    for kind in ("BF16", "Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, kind, SIZES)
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False  # read into memory, so that weights are repacked for this processor
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            raise SystemExit(f"llama.cpp does not load the {kind} model")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 8192, 512, 512, BATCH
        options.n_threads = options.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, options)
        memory = llama_cpp.llama_get_memory(context)
        batch = llama_cpp.llama_batch_init(512, 0, 1)  # 512 token ids, each in one sequence

        def feed(tokens: list[tuple[int, int]], context: Any = context, batch: Any = batch) -> None:
            """Compute a token for each (sequence, position).

            The logits of all tokens are requested, because for a token without logits llama.cpp omits most of the last
            layer's work.
            """
            batch.n_tokens = len(tokens)
            for i, (sequence, position) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = 1, position, 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = 1
            if llama_cpp.llama_decode(context, batch) != 0:
                raise SystemExit("llama_decode failed")
            llama_cpp.llama_synchronize(context)

        def truncate(length: int, memory: Any = memory) -> None:
            """Remove the tokens of all sequences from position `length` on."""
            for sequence in range(BATCH):
                llama_cpp.llama_memory_seq_rm(memory, sequence, length, -1)

        def prefill(feed: Any = feed, truncate: Any = truncate) -> None:
            truncate(0)
            feed([(0, position) for position in range(PROMPT)])

        def decode(n: int, feed: Any = feed, truncate: Any = truncate) -> None:
            truncate(PAST)
            feed([(sequence, PAST) for sequence in range(n)])

        prefill_ms = best(prefill, seconds)  # leaves a prompt in sequence 0
        for sequence in range(1, BATCH):
            feed([(sequence, position) for position in range(PAST)])
        report(
            f"llama.cpp {kind.lower()}",
            decode_1=best(functools.partial(decode, 1), seconds) / LAYERS,
            decode_8=best(functools.partial(decode, BATCH), seconds) / LAYERS,
            prefill=prefill_ms / LAYERS,
        )
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    del no_log  # the C library has used it until here


# ---- Paddle: our portable graph ----------------------------------------------------------------------------


def paddle_peer(threads: int, seconds: float) -> None:
    """Time per layer, from the difference between models with three layers and with one."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    figures = {}
    for n_layers in (1, 3):
        with tempfile.TemporaryDirectory() as folder:
            figures[n_layers] = portable_graph(Path(folder), n_layers, seconds)
    report(
        "portable graph float32", **{kind: (figures[3][kind] - figures[1][kind]) / 2 for kind in figures[1]}
    )


def portable_graph(folder: Path, n_layers: int, seconds: float) -> dict[str, float]:
    """Milliseconds of all layers of a model, by kind of work."""
    import numpy as np
    from safetensors.numpy import save_file

    from paddlemix_qwenvl_plugin import export_language, export_vision
    from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
    from paddlemix_qwenvl_plugin.runtime.programs import Stage
    from paddlemix_qwenvl_plugin.tiny.make import random_weights

    os.environ["QWENVL_ENGINE"] = "portable"
    vision = {"width": WIDTH, "layers": n_layers, "heads": VISION_HEADS, "mlp_ratio": VISION_MLP / WIDTH}
    vision |= {"image_size": 448, "patch_size": 14, "output_dim": HIDDEN, "image_start_id": 1}
    config = {"hidden_size": HIDDEN, "num_hidden_layers": n_layers, "num_attention_heads": HEADS}
    config |= {"intermediate_size": 2 * MLP, "vocab_size": 64, "visual": vision}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(parse_config(config, "7B"), seed=0), str(folder / "model.safetensors"))
    export_vision(folder, folder / "vision")
    export_language(folder, folder / "text", "qwen")
    encode = Stage(folder / "vision", "vision", "cpu").open()
    step = Stage(folder / "text" / "qwen", "language", "cpu").open(".step")
    # Features and position of an image; the row -1 marks it as absent.
    no_images = np.zeros([1, 256, HIDDEN], np.float32), np.array([[-1, 0, 0]])
    pixels = np.zeros([1, 3, 448, 448], np.float32)

    def empty_cache(n_rows: int) -> list[Any]:
        """Keys and values of each layer; the step program ignores their first position."""
        shape = [n_rows, HEADS, 1, HIDDEN // HEADS]
        return [step.zeros(shape, "float32") for _ in range(2 * n_layers)]

    def forward(cache: list[Any], n_rows: int, past: int, n_tokens: int) -> list[Any]:
        """Compute n_tokens tokens after `past` tokens; return the cache that contains them."""
        # Inputs of the step program: numbers of new tokens, of earlier tokens and of prompt tokens.
        lengths = (np.full([n_rows, 1], n) for n in (n_tokens, past, PROMPT))
        valid = np.tile(np.arange(past + 1) > 0, [n_rows, 1])
        return step([np.full([n_rows, n_tokens], 5), *no_images, *lengths, valid, *cache])[1:]

    figures = {"vision": best(lambda: encode([pixels]), seconds)}
    figures["prefill"] = best(lambda: forward(empty_cache(1), n_rows=1, past=0, n_tokens=PROMPT), seconds)
    for n in (1, BATCH):
        cache = forward(empty_cache(n), n, past=0, n_tokens=PAST)
        figures[f"decode_{n}"] = best(functools.partial(forward, cache, n, PAST, n_tokens=1), seconds)
    return figures


def main() -> None:
    kind, threads, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    {"torch": torch_peer, "llama": llama_peer, "paddle": paddle_peer}[kind](threads, seconds)


if __name__ == "__main__":
    main()
