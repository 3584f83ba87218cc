"""Unmodified llm/predict scripts of PaddleNLP at the pinned commit, run as processes if a checkout is given.

The environment of the processes has PaddleNLP's wheel; if no package index is reachable to download it, the tests are
skipped (wheel_environment.py).
"""

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

CHECKOUT = os.environ.get("QWENVL_PADDLENLP_DIR")
MODEL_FLAGS = ("--inference_model", "--model_type", "qwen-img2txt")

pytestmark = pytest.mark.skipif(
    CHECKOUT is None,
    reason="QWENVL_PADDLENLP_DIR is not set: a checkout of PaddleNLP at 498f709 (docs/upstream.md)",
)

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def script(wheel: Callable[[str], WheelEnvironment], tmp_path: Path) -> Script:
    """Function that runs a script of llm/predict by name, in the environment of the wheel 3.0.0b0."""

    def run(name: str, folder: Path, *flags: object, **env: str) -> subprocess.CompletedProcess[str]:
        llm = Path(CHECKOUT or "").resolve() / "llm"
        arguments = ("--model_name_or_path", folder, *MODEL_FLAGS, *flags)
        env = {"PYTHONPATH": f"{llm.parent}{os.pathsep}{llm}", **env}
        return wheel("3.0.0b0").run(llm / "predict" / name, *arguments, cwd=tmp_path, **env)

    return run


@pytest.mark.parametrize(
    ("scheme", "dtype", "device_flags"),
    [
        ("paddlemix", "float16", ["--device", "cpu"]),
        ("static", "float16", []),  # upstream's default is "--device gpu"
        ("huggingface", "float32", []),
    ],
)
def test_stock_export(
    script: Script, stock: StockModels, tmp_path: Path, scheme: str, dtype: str, device_flags: list[str]
) -> None:
    flags = ("--output_path", tmp_path / "out", "--model_prefix", "qwen", "--dtype", dtype, *device_flags)
    completed = script("export_model.py", stock.folders[scheme], *flags)
    assert completed.returncode == 0, completed.stderr[-3000:]
    # "portable": with float16 weights, the engine rounds activations to bfloat16 on some processors.
    vl = open_model(stock.golden.vision, tmp_path / "out" / "qwen", "portable")
    features = vl.encode_images(stock.golden.images)
    tokens = vl.generate_ids(stock.golden.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [stock.golden.figures["tokens"].tolist()]


@needs_compiler
@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_stock_export_of_quantized_weights(
    script: Script, stock: StockModels, tmp_path: Path, quant_type: str
) -> None:
    """The weights equal those of this project's export of the same folder."""
    flags = ("--output_path", tmp_path / "out", "--model_prefix", "qwen", "--dtype", "float32")
    completed = script("export_model.py", stock.folders["paddlemix"], *flags, "--quant_type", quant_type)
    assert completed.returncode == 0, completed.stderr[-3000:]
    expected = export_language(
        stock.folders["paddlemix"], tmp_path / "expected", "qwen", quant_type=quant_type
    )
    manifest = read_manifest(tmp_path / "out" / "qwen", "language")
    assert (manifest.quant_type, manifest.weights) == (quant_type, expected.weights)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cachekv_int8", "True"], "8-bit caches (use_cachekv_int8=dynamic): not supported"),
        (["--export_precache", "True"], "--export_precache: not supported"),
    ],
)
def test_unsupported_arguments(
    script: Script, stock: StockModels, tmp_path: Path, flags: list[str], message: str
) -> None:
    flags = [*flags, "--output_path", str(tmp_path / "out"), "--dtype", "float32"]
    completed = script("export_model.py", stock.folders["static"], *flags)
    assert completed.returncode == 1
    assert f"UsageError: {message}" in completed.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dynamic_predictor(script: Script, stock: StockModels, tmp_path: Path, dtype: str) -> None:
    texts = ["a b c", "the"]
    rows = [json.dumps({"src": text, "tgt": ""}) for text in texts]
    (tmp_path / "texts.json").write_text("\n".join(rows))
    flags = ("--mode", "dynamic", "--device", "cpu", "--dtype", dtype, "--decode_strategy", "greedy_search")
    sizes = ("--src_length", "64", "--max_length", "24", "--batch_size", "2")
    completed = script("predictor.py", stock.folders["static"], *flags, *sizes, "--data_file", "texts.json")
    assert completed.returncode == 0, completed.stderr[-3000:]
    outputs = [json.loads(line)["output"] for line in (tmp_path / "output.json").read_text().splitlines()]
    # The ids of special tokens, which the tokenizer omits, begin at len(VOCABULARY).
    expected = [
        [VOCABULARY[token] for token in tokens if token < len(VOCABULARY)]
        for tokens in answers(stock, texts, 24)
    ]
    assert outputs == [b"".join(tokens).decode("utf-8", "replace") for tokens in expected]
    assert all(len(tokens) > 10 for tokens in expected)
    assert not list(tmp_path.glob("real_time_save.*"))


def test_qwenvl_plugin_0_disables_the_plugin(script: Script, stock: StockModels, tmp_path: Path) -> None:
    flags = ("--output_path", tmp_path / "out", "--dtype", "float32")
    completed = script("export_model.py", stock.folders["static"], *flags, QWENVL_PLUGIN="0")
    assert completed.returncode != 0
    assert "No module named 'paddlenlp_ops'" in completed.stderr
