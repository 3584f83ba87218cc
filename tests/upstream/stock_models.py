"""Model folders of golden model a (tests/golden/README.md), as PaddleNLP reads them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import numpy as np

from paddlemix_qwenvl_plugin import QwenVL

# All bytes, and 176 further tokens: with the tokenizer's 208 special tokens, the 640 tokens of golden model a.
VOCABULARY = [bytes([i]) for i in range(256)] + [f"<{i}>".encode() for i in range(256, 432)]
# <|endoftext|>, the first special token.
END = len(VOCABULARY)
# Naming scheme -> checkpoint format in which weights with such names are published.
SCHEMES = {"paddlemix": "sharded-safetensors", "static": "pdparams", "huggingface": "safetensors"}


@dataclass(frozen=True)
class StockModels:
    """Golden model, and its model folder in each naming scheme."""

    golden: Any
    folders: dict[str, Path]


def write(golden: Any, folder: Path) -> StockModels:
    """Write a folder per scheme, with the minimal tokenizer_config.json of Qwen-VL for AutoTokenizer."""
    model_folders = {}
    vocabulary = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(VOCABULARY)]
    tokenizer_config = {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}
    for scheme, checkpoint_format in SCHEMES.items():
        weights = folders.renamed(golden.weights, scheme, transpose=scheme == "huggingface")
        model_folder = folders.write(
            folder / scheme, golden.folder / "config.json", weights, checkpoint_format
        )
        (model_folder / "qwen.tiktoken").write_text("".join(vocabulary))
        (model_folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        model_folders[scheme] = model_folder
    return StockModels(golden, model_folders)


def answers(stock: StockModels, texts: list[str], n_tokens: int) -> list[list[int]]:
    """Generate tokens with the exported golden model for ASCII texts, in which each character is a token."""
    vl = QwenVL.from_exported(stock.golden.vision, stock.golden.language)
    ids = np.full([len(texts), max(map(len, texts))], END)
    for row, text in zip(ids, texts):
        row[: len(text)] = list(text.encode())
    return vl.generate_ids(ids, lengths=list(map(len, texts)), max_new_tokens=n_tokens, eos_token_ids=[END])
