"""Properties of the exported programs: inputs, dtypes, manifest, and files."""

from __future__ import annotations

import re
from pathlib import Path

import paddle
import pytest
from engines import HAS_COMPILER

from paddlemix_qwenvl_plugin.artifact.contract import stock_inputs, vision_inputs
from paddlemix_qwenvl_plugin.artifact.manifest import read_manifest
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import load_config
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.runtime.programs import Stage

STOCK_NAMES = [
    "input_ids",
    "image_features",
    "img_pos",
    "attention_mask",
    "position_ids",
    "penalty_score",
    "frequency_score",
    "presence_score",
    "min_length",
    "max_length",
    "temperature",
    "top_p",
    "eos_token_id",
    "seq_len_encoder",
    "seq_len_decoder",
    "step_idx",
    "stop_flags",
    "tgt_ids",
    "tgt_pos",
    "tgt_generation_mask",
    "pre_ids",
    "stop_nums",
]


def program_text(path):
    """A PIR program as Paddle prints it."""
    paddle.enable_static()
    try:
        program, *_ = paddle.static.load_inference_model(
            str(path.with_suffix("")), paddle.static.Executor(paddle.CPUPlace())
        )
        return str(program)
    finally:
        paddle.disable_static()


def result_types(text, operator):
    """The element types of an operator's results, such as f32, from lines with `"pd_op.NAME" … -> tensor<…xf32>`."""
    return re.findall(rf'"pd_op\.{operator}".* -> tensor<\S*?(b?f\d+)>', text)


@pytest.mark.parametrize("extension", [".json", ".pdmodel"])
def test_stock_input_names_and_order(golden, extension):
    model = golden("a")
    predictor = Stage(f"{model.language}{extension}", "language", "cpu").open()._predictor
    layers = model.config["num_hidden_layers"]
    assert predictor.get_input_names() == STOCK_NAMES + [f"cache_kvs_{i}" for i in range(layers)]
    assert len(predictor.get_output_names()) == 6  # the stock predictor's five, and the completions


def test_declared_contract(golden):
    config = load_config(golden("a").folder)
    inputs = {entry.name: (entry.shape, entry.dtype) for entry in stock_inputs(config, "float16", "float16")}
    assert inputs["attention_mask"] == ((-1, -1), "float16")
    assert inputs["cache_kvs_0"] == ((2, -1, 2, -1, 128), "float16")
    assert inputs["seq_len_encoder"] == ((-1, 1), "int32")
    assert vision_inputs(config, "float16", "float16")[0].shape == (-1, 3, 448, 448)


@pytest.mark.parametrize(("dtype", "printed"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_dtypes_of_half_precision_programs(golden, tmp_path, dtype, printed):
    """Matrix products have the half-precision type, softmax has float32, and no operator has float64."""
    model = golden("a")
    export_vision(model.folder, tmp_path / "vision", dtype)
    export_language(model.folder, tmp_path, "qwen", dtype)
    # Paddle reads a program's parameters from a file of the same name.
    (tmp_path / "qwen.step.pdiparams").symlink_to(tmp_path / "qwen.pdiparams")
    for name in ("vision", "qwen", "qwen.step"):
        text = program_text(tmp_path / f"{name}.json")
        assert "f64>" not in text
        assert set(result_types(text, "matmul")) == {printed}
        assert set(result_types(text, "softmax")) == {"f32"}


def test_manifest(golden):
    model = golden("a")
    vision, language = read_manifest(model.vision, "vision"), read_manifest(model.language, "language")
    assert vision.model == language.model == Checkpoint(model.folder).fingerprint()
    assert (language.contract, language.dtype, language.paddle) == (3, "float32", paddle.__version__)
    assert language.config == load_config(model.folder)
    kinds = ["", ".step", ".fused"] if HAS_COMPILER else ["", ".step"]
    assert set(language.programs) == {f"qwen{kind}{form}" for kind in kinds for form in (".json", ".pdmodel")}
    assert language.weights.bytes == (model.language.with_name("qwen.pdiparams")).stat().st_size


def test_different_models_have_different_fingerprints(golden):
    assert Checkpoint(golden("a").folder).fingerprint() != Checkpoint(golden("b").folder).fingerprint()


def test_the_files_of_an_exported_language_stage(golden):
    model = golden("a")
    names = {path.name for path in model.language.parent.iterdir()}
    assert names == {
        "config.json",
        "qwen.manifest.json",
        "qwen.pdiparams",
        *read_manifest(model.language, "language").programs,
    }


def test_programs_contain_no_path_of_this_machine(golden):
    """Paddle saves the Python call stack of each operator in legacy programs; the export removes it."""
    model = golden("a")
    programs = [*model.vision.parent.iterdir(), *model.language.parent.iterdir()]
    programs = [path for path in programs if path.suffix in (".json", ".pdmodel")]
    assert len(programs) > 6
    for path in programs:
        content = path.read_bytes()
        assert b"site-packages" not in content, path.name
        assert str(Path(__file__).resolve().parents[2]).encode() not in content, path.name
