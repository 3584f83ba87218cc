"""Fixtures: tokenizers with the vocabulary of the tests and with Qwen-VL's, and golden values of PaddleMIX."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary

GOLDEN = Path(__file__).parents[1] / "golden" / "text"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_tokens() -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "qwen.tiktoken"
    write_tiny_vocabulary(path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_vocab_file: Path) -> QwenTokenizer:
    """Tokenizer with the tiny vocabulary: the 256 bytes and 200 merges."""
    return QwenTokenizer(tiny_vocab_file)


@pytest.fixture(scope="session")
def real(golden_tokens: dict[str, Any]) -> QwenTokenizer:
    """Tokenizer with the vocabulary of Qwen-VL, from the package dashscope; skip the test without it."""
    spec = importlib.util.find_spec("dashscope")  # without an import, which is slow
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the real vocabulary comes with the package dashscope: pip install --no-deps dashscope")
    vocab_file = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    if not vocab_file.exists():
        pytest.skip(f"this version of dashscope carries no {vocab_file.name}: pip install dashscope==2.0.2")
    if hashlib.sha256(vocab_file.read_bytes()).hexdigest() != golden_tokens["vocab_sha256"]:
        pytest.skip("dashscope carries another vocabulary than the golden's: pip install dashscope==2.0.2")
    return QwenTokenizer(vocab_file)
