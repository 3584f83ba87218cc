"""PaddleNLP's own llm/predict scripts at the pinned commit, unmodified, as processes (opt-in)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import needs_compiler, open_model
from stock_models import VOCABULARY, StockModels, answers
from wheel_environment import WheelEnvironment

from paddlemix_qwenvl_plugin import export_language
from paddlemix_qwenvl_plugin.artifact.manifest import read_manifest

TREE = os.environ.get("QWENVL_PADDLENLP_DIR")
MODEL = ("--inference_model", "--model_type", "qwen-img2txt")

pytestmark = pytest.mark.skipif(
    TREE is None,
    reason="QWENVL_PADDLENLP_DIR is not set: a checkout of PaddleNLP at 498f709 (docs/upstream.md)",
)

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(wheel: Callable[[str], WheelEnvironment], tmp_path: Path) -> Script:
    """Function that runs a script of llm/predict by name; the checkout has the requirements of its wheel."""

    def run(name: str, folder: Path, *flags: object, **env: str) -> subprocess.CompletedProcess[str]:
        path = Path(TREE or "").resolve() / "llm"
        command = ("--model_name_or_path", folder, *MODEL, *flags)
        env = {"PYTHONPATH": f"{path.parent}{os.pathsep}{path}", **env}
        return wheel("3.0.0b0").run(path / "predict" / name, *command, cwd=tmp_path, **env)

    return run


@pytest.mark.parametrize(
    ("scheme", "dtype", "device"),
    [
        ("paddlemix", "float16", ["--device", "cpu"]),
        ("static", "float16", []),  # upstream's default is gpu
        ("huggingface", "float32", []),
    ],
)
def test_stock_export(
    script: Script, stock: StockModels, tmp_path: Path, scheme: str, dtype: str, device: list[str]
) -> None:
    flags = ("--output_path", tmp_path / "out", "--model_prefix", "qwen", "--dtype", dtype, *device)
    done = script("export_model.py", stock.folders[scheme], *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    # The engine rounds activations where weights are float16.
    vl = open_model(stock.golden.vision, tmp_path / "out" / "qwen", "portable")
    features = vl.encode_images(stock.golden.images)
    tokens = vl.generate_ids(stock.golden.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [stock.golden.figures["tokens"].tolist()]


@needs_compiler
@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_stock_export_of_quantized_weights(
    script: Script, stock: StockModels, tmp_path: Path, quant_type: str
) -> None:
    """Compare with our export of the same folder, whose answers are checked elsewhere."""
    flags = ("--output_path", tmp_path / "out", "--model_prefix", "qwen", "--dtype", "float32")
    done = script("export_model.py", stock.folders["paddlemix"], *flags, "--quant_type", quant_type)
    assert done.returncode == 0, done.stderr[-3000:]
    own = export_language(stock.folders["paddlemix"], tmp_path / "own", "qwen", quant_type=quant_type)
    stock_export = read_manifest(tmp_path / "out" / "qwen", "language")
    assert (stock_export.quant_type, stock_export.weights) == (quant_type, own.weights)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cachekv_int8", "True"], "8-bit caches (use_cachekv_int8=dynamic): not supported"),
        (["--export_precache", "True"], "--export_precache: not supported"),
    ],
)
def test_unsupported_arguments(
    script: Script, stock: StockModels, tmp_path: Path, flags: list[str], line: str
) -> None:
    flags = [*flags, "--output_path", str(tmp_path / "out"), "--dtype", "float32"]
    done = script("export_model.py", stock.folders["static"], *flags)
    assert done.returncode == 1
    assert f"UsageError: {line}" in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dynamic_predictor(script: Script, stock: StockModels, tmp_path: Path, dtype: str) -> None:
    texts = ["a b c", "the"]
    lines = [json.dumps({"src": text, "tgt": ""}) for text in texts]
    (tmp_path / "texts.json").write_text("\n".join(lines))
    flags = ("--mode", "dynamic", "--device", "cpu", "--dtype", dtype, "--decode_strategy", "greedy_search")
    sizes = ("--src_length", "64", "--max_length", "24", "--batch_size", "2")
    done = script("predictor.py", stock.folders["static"], *flags, *sizes, "--data_file", "texts.json")
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line)["output"] for line in (tmp_path / "output.json").read_text().splitlines()]
    # The tokenizer omits its special tokens, which follow the vocabulary.
    rows = [
        [VOCABULARY[token] for token in row if token < len(VOCABULARY)] for row in answers(stock, texts, 24)
    ]
    assert said == [b"".join(row).decode("utf-8", "replace") for row in rows]
    assert all(len(row) > 10 for row in rows)
    assert not list(tmp_path.glob("real_time_save.*"))


def test_off_switch(script: Script, stock: StockModels, tmp_path: Path) -> None:
    flags = ("--output_path", tmp_path / "out", "--dtype", "float32")
    done = script("export_model.py", stock.folders["static"], *flags, QWENVL_PLUGIN="0")
    assert done.returncode != 0
    assert "No module named 'paddlenlp_ops'" in done.stderr
