"""Golden model a as model folders for PaddleNLP."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import numpy as np

from paddlemix_qwenvl_plugin import QwenVL

# The tokenizer appends 208 special tokens, 640 in all: the size of golden model a.
VOCABULARY = [bytes([i]) for i in range(256)] + [f"<{i}>".encode() for i in range(256, 432)]
END = len(VOCABULARY)
# Naming scheme -> format in which such weights are published.
SCHEMES = {"paddlemix": "sharded-safetensors", "static": "pdparams", "huggingface": "safetensors"}


@dataclass(frozen=True)
class StockModels:
    """Golden model, and its folder in each naming scheme."""

    golden: Any
    folders: dict[str, Path]


def write(golden: Any, folder: Path) -> StockModels:
    """Write a folder per scheme, with the minimal tokenizer_config.json of Qwen-VL for AutoTokenizer."""
    made = {}
    for scheme, kind in SCHEMES.items():
        weights = folders.renamed(golden.weights, scheme, transpose=scheme == "huggingface")
        made[scheme] = folders.write(folder / scheme, golden.folder / "config.json", weights, kind)
        lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(VOCABULARY)]
        (made[scheme] / "qwen.tiktoken").write_text("".join(lines))
        settings = {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}
        (made[scheme] / "tokenizer_config.json").write_text(json.dumps(settings))
    return StockModels(golden, made)


def answers(stock: StockModels, texts: list[str], n_tokens: int) -> list[list[int]]:
    """Tokens that the exported golden model generates for ASCII texts, in which each character is a token."""
    vl = QwenVL.from_exported(stock.golden.vision, stock.golden.language)
    ids = np.full([len(texts), max(map(len, texts))], END)
    for row, text in zip(ids, texts):
        row[: len(text)] = list(text.encode())
    return vl.generate_ids(ids, lengths=list(map(len, texts)), max_new_tokens=n_tokens, eos_token_ids=[END])
