"""Write random weights of a Qwen-1 geometry as a GGUF file for llama.cpp.

Imported by cpu_peers.py. serve_models.py runs it as a program, with a Python that need not have this package:
python benchmarks/gguf_weights.py PATH JSON, where JSON is an object with the other arguments of write_gguf. Needs NumPy
and gguf.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Optional

# Number of different rows of a matrix. Further rows repeat them, because drawing random numbers takes time.
RANDOM_ROWS = 4096
# The vocabulary begins with a token for each byte.
N_BYTES = 256


def write_gguf(
    path: Path,
    kind: str,
    sizes: dict[str, Any],
    n_words: Optional[int] = None,
) -> None:
    """Write a model of llama.cpp's architecture "qwen"; the weights of its norms and its biases are 1, not random.

    Args:
        kind: gguf's name of the storage type, such as Q8_0.
        sizes: as in config.json.
        n_words: number of word tokens, which follow the 256 byte tokens and precede the stop token. Only word tokens
            have random logits; the logits of all other tokens, the stop token included, are 0 and thus never the
            largest (serve_models.py). None: a model without a tokenizer, whose logits are all random.
    """
    import gguf
    import numpy as np
    from gguf import quants

    storage_type = getattr(gguf.GGMLQuantizationType, kind)
    hidden, mlp, vocab = sizes["hidden_size"], sizes["intermediate_size"] // 2, sizes["vocab_size"]
    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * mlp)  # as in config.json; llama.cpp halves it
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_rope_freq_base(10000)
    writer.add_rope_dimension_count(sizes["kv_channels"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}"))
    random = np.random.default_rng(0)

    def vector(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, np.float32))

    def matrix(name: str, n_rows: int, n_columns: int, random_rows: slice = slice(None)) -> None:
        """Add a matrix, of which `random_rows` are random (default: all) and the others 0."""
        floats = random.standard_normal((min(n_rows, RANDOM_ROWS), n_columns)).astype(np.float32)
        quantized = quants.quantize(floats * np.float32(0.02), storage_type)
        values = np.zeros((n_rows, *quantized.shape[1:]), quantized.dtype)
        values[random_rows] = np.resize(quantized, values[random_rows].shape)
        writer.add_tensor(name, values, raw_dtype=storage_type)

    if n_words is None:
        word_rows = slice(None)
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(vocab)
    else:
        end = N_BYTES + n_words
        word_rows = slice(N_BYTES, end)
        byte_tokens = _gpt2_byte_tokens()
        # U+0120 is GPT-2's character for a space.
        word_tokens = [f"\u0120{i:06d}" for i in range(N_BYTES, end)]
        control_tokens = [f"<|{i}|>" for i in range(end, vocab)]
        normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*byte_tokens, *word_tokens, *control_tokens])
        writer.add_token_types([normal] * end + [control] * len(control_tokens))
        writer.add_token_merges(["0 0"])  # unused, since prompts are token ids
        writer.add_eos_token_id(end)

    matrix("token_embd.weight", vocab, hidden)
    vector("output_norm.weight", hidden)
    matrix("output.weight", vocab, hidden, word_rows)
    for i in range(sizes["num_hidden_layers"]):
        vector(f"blk.{i}.attn_norm.weight", hidden)
        matrix(f"blk.{i}.attn_qkv.weight", 3 * hidden, hidden)
        vector(f"blk.{i}.attn_qkv.bias", 3 * hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        vector(f"blk.{i}.ffn_norm.weight", hidden)
        matrix(f"blk.{i}.ffn_gate.weight", mlp, hidden)
        matrix(f"blk.{i}.ffn_up.weight", mlp, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gpt2_byte_tokens() -> list[str]:
    """Characters of the bytes in GPT-2's vocabulary.

    A byte that is printable in Latin-1 is represented by itself, the others by the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = sorted(set(range(256)) - printable)
    return [chr(b) if b in printable else chr(256 + unprintable.index(b)) for b in range(256)]


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), **json.loads(sys.argv[2]))
