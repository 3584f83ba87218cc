"""Models with random weights for serve.py and ray_serve.py: exported stages, and a GGUF file for llama.cpp.

The language model's matrices have 8 bits. The vocabulary is synthetic. Only word tokens, each a space and six digits,
have random logits; the logits of all other tokens, stop tokens included, are 0 and thus never the largest. So every
token of a completion is a word, which a server can send in a separate event.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from paddlemix_qwenvl_plugin import export_language, export_vision
from paddlemix_qwenvl_plugin.checkpoint import safetensors_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from geometry_7b import write_model

_VISION: dict[str, Any] = {  # small, because no request has an image
    "heads": 6,
    "image_size": 128,
    "layers": 1,
    "mlp_ratio": 4.0,
    "n_queries": 256,
    "patch_size": 8,
    "width": 192,
}
SIZES: dict[str, dict[str, Any]] = {
    # Four layers of the 7B model, with its whole vocabulary.
    "slice": {
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "visual": {**_VISION, "image_start_id": 151857, "output_dim": 4096},
    },
    # The demo model's language stage.
    "demo": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "intermediate_size": 768,
        "vocab_size": 896,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "visual": {**_VISION, "image_start_id": 890, "output_dim": 256},
    },
}
# The vocabulary: a token for each byte, words, special tokens. <img> (image_start_id) is special; 214 other special
# tokens precede it.
_N_BYTES, _SPECIAL_BEFORE_IMAGE = 256, 214


def words(sizes: dict[str, Any]) -> range:
    """Ids of the word tokens."""
    return range(_N_BYTES, sizes["visual"]["image_start_id"] - _SPECIAL_BEFORE_IMAGE)


def export_stages(folder: Path, sizes: dict[str, Any]) -> None:
    """Write FOLDER/vision.* and FOLDER/text/qwen.*, and their checkpoint FOLDER/model."""
    model = write_model(folder / "model", sizes, "bfloat16")
    tokens = [bytes([byte]) for byte in range(_N_BYTES)] + [_word(i).encode() for i in words(sizes)]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (model / "qwen.tiktoken").write_text("".join(lines))
    _clear_other_rows(model, sizes)
    export_vision(model, folder / "vision", "bfloat16")
    export_language(model, folder / "text", "qwen", "bfloat16", quant_type="weight_only_int8")


def export_gguf(path: Path, sizes: dict[str, Any], python: Path) -> None:
    """Write a model of these sizes, with other weights than `export_stages`, for llama.cpp; `python` has gguf."""
    description = {"kind": "Q8_0", "sizes": sizes, "n_words": len(words(sizes))}
    script = Path(__file__).with_name("gguf_weights.py")
    subprocess.run([python, script, path, json.dumps(description)], check=True)


def _word(token: int) -> str:
    return f" {token:06d}"


def _clear_other_rows(model: Path, sizes: dict[str, Any]) -> None:
    """Overwrite the rows of lm_head with zeros in the checkpoint, except those of word tokens."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    path = model / index["weight_map"]["lm_head.weight"]
    entry = safetensors_file.read_header(path)["lm_head.weight"]
    row_bytes = entry.n_bytes // sizes["vocab_size"]
    with path.open("r+b") as file:
        for ids in (range(words(sizes).start), range(words(sizes).stop, sizes["vocab_size"])):
            file.seek(entry.offset + ids.start * row_bytes)
            file.write(bytes(len(ids) * row_bytes))
