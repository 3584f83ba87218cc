"""Quantized checkpoints: the written files, the report, resumed runs, and the command `qwenvl quantize`."""

from __future__ import annotations

import json
import math
import re
import shutil
import string
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin import UsageError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
from paddlemix_qwenvl_plugin.cli.main import main
from paddlemix_qwenvl_plugin.modeling.language import Position, chunk_mask
from paddlemix_qwenvl_plugin.modeling.weights import load_language, load_vision
from paddlemix_qwenvl_plugin.processing.images import load_image, preprocess
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.quantization import job, layers
from paddlemix_qwenvl_plugin.quantization.folder import GptqFolder
from paddlemix_qwenvl_plugin.quantization.job import quantize_model
from paddlemix_qwenvl_plugin.quantization.rows import CalibrationRow, CalibrationRows
from paddlemix_qwenvl_plugin.tiny.make import random_weights
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary

GROUP = 32
N_ROWS = 16
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
NOT_COPIED = ("optimizer.pdopt", "optimizer.pt", "scaler.pth", "qwen.pdiparams", "qwen.json")
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


@pytest.fixture(scope="module", autouse=True)
def _several_chunks():
    """Few tokens per product, so that X^T X is the sum of several products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_TOKENS_AT_ONCE", 200)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model: two layers of width 128, and images of 36 slots."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_vocabulary(folder / "qwen.tiktoken")
    tokenizer = QwenTokenizer.from_folder(folder)
    vision = {"image_size": 56, "patch_size": 14, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
    config = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 64,
        "intermediate_size": 320,
        "vocab_size": -(-tokenizer.n_vocab // 64) * 64,
        "visual": {**vision, "output_dim": 128, "n_queries": 36, "image_start_id": tokenizer.img_start_id},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(parse_config(config, "test"), 3), folder / "model.safetensors")
    (folder / "tokenizer_config.json").write_text('{"picture_label": "Picture {}:"}')
    for name in NOT_COPIED:
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Calibration rows in the project's format and in OpenAI's, with and without images and answers."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(N_ROWS):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{i}.png")
        prompt = "".join(string.ascii_lowercase[letter] for letter in rng.integers(0, 26, 24))
        row = {"id": i, "prompt": prompt}
        if i % 3 == 1:
            content = [
                {"type": "text", "text": prompt},
                {"type": "image_url", "image_url": {"url": f"{i}.png"}},  # relative to the rows' folder
            ]
            row = {"custom_id": str(i), "body": {"messages": [{"role": "user", "content": content}]}}
        elif i % 3 == 2:
            row["image"] = f"{i}.png"
        if i % 2:
            row["answer"] = f"<ref>{prompt[:5]}</ref><box>(1,2),(3,4)</box>"
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def quantized(model, rows, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "q4"
    quantize_model(model, target, 4, GROUP, rows)
    return target


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(index.values())):
        shard = load_file(folder / file)
        assert all(index[name] == file for name in shard)
        found.update(shard)
    assert set(found) == set(index)
    return found


def unpacked(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The weight [out, in] in float32, from GPTQ's tensors of 4 bits; zero points are stored less 1."""
    shifts = np.arange(0, 32, 4)
    words, zeros = tensors[f"{name}.qweight"].astype(np.int64), tensors[f"{name}.qzeros"].astype(np.int64)
    integers = ((words[:, None] >> shifts[:, None]) & 15).reshape(-1, words.shape[1])
    zeros = ((zeros[..., None] >> shifts) & 15).reshape(len(zeros), -1) + 1
    groups = tensors[f"{name}.g_idx"]
    scales = tensors[f"{name}.scales"][groups].astype(np.float32)
    return (scales * (integers - zeros[groups]).astype(np.float32)).T


def test_folder(quantized, model):
    """The folder has GPTQ's tensors, the other tensors unchanged, the copied files, and a quantization_config."""
    found, original = tensors_of(quantized), Checkpoint(model)
    names = {**original.language, **original.vision}
    expected = set()
    for name, values in original.tensors(names, "float32", out_in=True):
        if names[name].linear and name.startswith("h."):
            stem = f"transformer.{name.removesuffix('.weight')}"
            expected |= {f"{stem}.{suffix}" for suffix in SUFFIXES}
            difference = unpacked(found, stem) - values
            assert np.linalg.norm(difference) < 0.2 * np.linalg.norm(values), name
            np.testing.assert_array_equal(found[f"{stem}.g_idx"], np.arange(values.shape[1]) // GROUP)
        else:
            stored = name if name == "lm_head.weight" else f"transformer.{name}"
            expected.add(stored)
            np.testing.assert_array_equal(found[stored], values)
    assert set(found) == expected
    config = json.loads((quantized / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert {key: settings[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym")} == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": False,
    }
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        assert (quantized / name).read_bytes() == (model / name).read_bytes()
    assert not [name for name in NOT_COPIED if (quantized / name).exists()]
    assert not (quantized.parent / "q4.partial").exists()


@dataclass
class Forward:
    """Forward pass of image encoder and language model in Paddle's dynamic mode.

    Attributes:
        folder: the model's folder.
        images: folder of the images that the rows name.
        grams: X^T X of each matrix's inputs X, summed over all rows so far; keys "LAYER MATRIX", as in "0 mlp.w1".
    """

    folder: Path
    images: Path
    grams: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checkpoint = Checkpoint(self.folder)
        self.vision, self.language = load_vision(self.checkpoint), load_language(self.checkpoint)
        for number, layer in enumerate(self.language.layers):
            linears = (layer.attn.c_attn, layer.attn.c_proj, layer.w1, layer.w2, layer.c_proj)
            for name, linear in zip(MATRICES, linears):
                linear.register_forward_pre_hook(partial(self._add, f"{number} {name}"))

    def _add(self, key: str, _: paddle.nn.Layer, inputs: tuple[paddle.Tensor]) -> None:
        x = inputs[0].numpy()[0].astype(np.float64)
        self.grams[key] = self.grams.get(key, 0) + x.T @ x

    @paddle.no_grad()
    def __call__(self, row: CalibrationRow) -> tuple[list[np.ndarray], np.ndarray]:
        """The hidden states after each layer, and the most likely next token at each position."""
        language, ids = self.language, paddle.to_tensor([row.input_ids])
        x = language.embed_tokens(ids)
        if row.images:
            images = [preprocess(load_image(self.images / image), 56) for image in row.images]
            img_pos = paddle.to_tensor([[0, start, end] for start, end in row.spans])
            x = language.embed(ids, self.vision(paddle.to_tensor(np.stack(images))), img_pos)
        positions = paddle.arange(ids.shape[1]).unsqueeze(0)
        length, mask = paddle.to_tensor([[row.n_prompt]]), chunk_mask(positions, None)
        position = Position(positions, length, mask, self.checkpoint.config)
        states = []
        for layer in language.layers:
            x, _ = layer(x, position, None)
            states.append(x.numpy()[0])
        return states, language.lm_head(language.ln_f(x)).numpy()[0].argmax(-1)


def test_report(quantized, model, rows, tmp_path):
    """The figures of the report equal those computed here with the original and the quantized model."""
    report = json.loads((quantized / "quantization_report.json").read_text())
    found = tensors_of(quantized)
    dequantized = shutil.copytree(model, tmp_path / "dequantized")
    weights = load_file(model / "model.safetensors")
    changes = {}
    for layer in range(2):
        for matrix in MATRICES:
            name = f"transformer.llm.h.{layer}.{matrix}.weight"
            values = unpacked(found, f"transformer.h.{layer}.{matrix}")
            changes[f"{layer} {matrix}"] = weights[name].T, values
            weights[name] = values.T.copy()
    save_file(weights, dequantized / "model.safetensors")
    original, changed = Forward(model, rows.parent), Forward(dequantized, rows.parent)
    config = original.checkpoint.config
    # False: not a chat model.
    loaded = CalibrationRows(rows, QwenTokenizer.of_model(model, config), config, False).rows
    held_out = [loaded[7], loaded[15]]  # every eighth row
    calibration = [row for row in loaded if row not in held_out]
    assert (report["rows"], report["skipped_rows"]) == (N_ROWS - 2, 0)
    assert report["tokens"] == sum(len(row.input_ids) for row in calibration)

    # The calibration inputs of a matrix are those of the quantized model: the matrices before it are quantized.
    for row in calibration:
        changed(row)
    for key, (before, after) in changes.items():
        layer, matrix = key.split()
        difference, gram = before.astype(np.float64) - after, changed.grams[key]
        # Relative error of the matrix's outputs on the calibration inputs; `nearest`: that of rounding to nearest.
        expected = math.sqrt(np.vdot(difference @ gram, difference) / np.vdot(before @ gram, before))
        error, nearest = report["layers"][int(layer)]["matrices"][matrix]
        assert error == pytest.approx(expected, rel=2e-3), key
        assert error < nearest

    # For each held-out row, (states, tokens) of the original and of the quantized model.
    outputs = [(original(row), changed(row)) for row in held_out]
    for layer in range(2):
        before = np.concatenate([states[layer] for (states, _), _ in outputs])
        after = np.concatenate([states[layer] for _, (states, _) in outputs])
        expected = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert report["layers"][layer]["states"] == pytest.approx(expected, rel=1e-3)
    changed_tokens = []
    for row, ((_, tokens_before), (_, tokens_after)) in zip(held_out, outputs):
        answer = slice(row.n_prompt - 1, len(row.input_ids) - 1)  # positions that predict the answer's tokens
        changed_tokens.append(tokens_before[answer] != tokens_after[answer])
    assert report["held_out"] == {
        "tokens": sum(int(row.sum()) for row in changed_tokens),
        "of_tokens": sum(map(len, changed_tokens)),
        "rows": sum(bool(row.any()) for row in changed_tokens),
        "of_rows": 2,
    }
    assert report["bytes"] == sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    assert report["bytes_before"] == sum(values.nbytes for values in weights.values())


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["write_layer", "finish"])
def test_resume(quantized, model, rows, tmp_path, monkeypatch, method):
    """A run that was interrupted in the second layer or at the end and then resumed writes the same bytes."""
    # calls: the first argument of each call, the layer's index for write_layer, the number of bits for finish.
    target, calls = tmp_path / "q4", []
    original = getattr(GptqFolder, method)

    def interrupted(self, first, *arguments):
        calls.append(first)
        if method == "finish" or first == 1:
            raise KeyboardInterrupt
        return original(self, first, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GptqFolder, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(model, target, 4, GROUP, rows)
    assert calls == ([0, 1] if method == "write_layer" else [4])
    assert not target.exists()
    with pytest.raises(UsageError, match=r"q4.partial: an interrupted run with other settings; remove it"):
        quantize_model(model, target, 8, GROUP, rows)

    def never(*_):
        raise AssertionError("the interrupted run has embedded the rows already")

    with monkeypatch.context() as patch:
        patch.setattr(job, "embed", never)
        quantize_model(model, target, 4, GROUP, rows)
    assert content(target) == content(quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["q4"]


def test_two_runs_with_one_target(model, rows, tmp_path, monkeypatch):
    """A run is refused while another run, here of the same process, writes the folder."""

    def concurrent(*_):
        with pytest.raises(UsageError, match="another process is writing it; wait for it"):
            quantize_model(model, tmp_path / "q8", 8, GROUP, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "embed", concurrent)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tmp_path / "q8", 8, GROUP, rows)


def test_limit_on_tokens(model, rows, tmp_path, monkeypatch):
    """Rows beyond the limit are skipped, and the report counts them."""
    monkeypatch.setattr(job, "MAX_TOKENS", 700)
    report = quantize_model(model, tmp_path / "q8", 8, GROUP, rows)
    assert report.skipped_rows > 0
    assert report.rows + report.skipped_rows + report.held_out.of_rows == N_ROWS
    assert f"{report.skipped_rows} more rows are beyond the limit on tokens" in next(iter(report.lines()))


def test_command(model, tmp_path, monkeypatch, capsys):
    """The command prints figures of the report; without --data, the first line names the source of the rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.quantization.rows.N_DRAWN", 8)
    arguments = ["quantize", str(model), "q4", "--bits", "4"]
    monkeypatch.setattr(sys, "argv", ["qwenvl", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert not exit_info.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Without --data: calibrating on drawn images")
    assert json.loads(Path("q4/config.json").read_text())["quantization_config"]["group_size"] == 32
    report = json.loads(Path("q4/quantization_report.json").read_text())
    assert f"calibrated on 7 rows, {report['tokens']} tokens" in lines
    tokens, of_tokens = report["held_out"]["tokens"], report["held_out"]["of_tokens"]
    held_out = re.compile(rf"held-out rows: {tokens} of {of_tokens} tokens changed, in . of 1 rows")
    assert any(held_out.fullmatch(line) for line in lines)
    assert lines[-1] == "wrote q4; the figures are in q4/quantization_report.json"
