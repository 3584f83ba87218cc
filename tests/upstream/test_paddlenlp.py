"""PaddleNLP's own llm/predict/export_model.py, unmodified, as a process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix_qwenvl_plugin import QwenVL

TREE = os.environ.get("QWENVL_PADDLENLP_DIR")

pytestmark = [
    pytest.mark.skipif(
        TREE is None,
        reason="QWENVL_PADDLENLP_DIR is not set: a checkout of PaddleNLP at 498f709 (docs/upstream.md)",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("paddlenlp") is None,
        reason="paddlenlp is not installed: pip install 'paddlemix-qwenvl-plugin[paddlenlp]'",
    ),
]


def export_model(model: Path, output: Path, dtype: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "predict/export_model.py", "--model_name_or_path", str(model)),
            *("--output_path", str(output), "--dtype", dtype, "--inference_model"),
            *("--model_prefix", "qwen", "--model_type", "qwen-img2txt", "--device", "cpu"),
        ],
        cwd=Path(TREE or "") / "llm",
        env={**os.environ, "PYTHONPATH": f"{TREE}:{TREE}/llm", **env},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def stock_model(golden, tiny_exported):
    """Golden model a with what PaddleNLP's AutoTokenizer needs; any vocabulary will do for ids."""
    model = golden("a")
    vocabulary = tiny_exported / "model" / "qwen.tiktoken"
    (model.folder / "qwen.tiktoken").write_bytes(vocabulary.read_bytes())
    settings = {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}
    (model.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stock_export(stock_model, tmp_path, dtype):
    done = export_model(stock_model.folder, tmp_path, dtype)
    assert done.returncode == 0, done.stderr[-3000:]
    vl = QwenVL.from_exported(stock_model.vision, tmp_path / "qwen")
    features = vl.encode_images(stock_model.images)
    tokens = vl.generate_ids(stock_model.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [stock_model.figures["tokens"].tolist()]


def test_off_switch(stock_model, tmp_path):
    done = export_model(stock_model.folder, tmp_path, "float32", QWENVL_PLUGIN="0")
    assert done.returncode != 0
    assert "No module named 'paddlenlp_ops'" in done.stderr
