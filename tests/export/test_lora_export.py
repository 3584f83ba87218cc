"""An export with `--lora` writes what an export of the merged folder writes."""

from __future__ import annotations

import shutil
import sys
import tracemalloc

import pytest
from engines import needs_compiler
from lora_folders import LORA, base, make_peft, pair, write_base
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin import QwenVLError, export_language, export_vision
from paddlemix_qwenvl_plugin.artifact.manifest import check_pair, read_manifest
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.cli.main import main

ADAPTERS = [(LORA / "peft", 0.5), LORA / "paddlenlp"]


@pytest.fixture
def folder(tmp_path):
    return write_base(tmp_path / "model", "huggingface")


@pytest.fixture
def merged(folder, tmp_path):
    """A model folder with the weights merged from ADAPTERS."""
    target = tmp_path / "merged"
    target.mkdir()
    checkpoint = Checkpoint(folder, ADAPTERS)
    specs = {**checkpoint.language, **checkpoint.vision}
    tensors = {
        SCHEMES["paddlemix"].name(name): values for name, values in checkpoint.tensors(specs, "float32")
    }
    save_file(tensors, str(target / "model.safetensors"))
    shutil.copyfile(folder / "config.json", target / "config.json")
    return target


def test_the_parameter_files_are_those_of_the_merged_folder(folder, merged, tmp_path):
    form = {"dtype": "bfloat16", "engine": "portable"}
    vision = export_vision(folder, tmp_path / "v" / "v", lora=ADAPTERS, **form)
    assert vision.weights == export_vision(merged, tmp_path / "w" / "v", **form).weights
    language = export_language(folder, tmp_path / "t", lora=ADAPTERS, **form)
    assert language.weights == export_language(merged, tmp_path / "u", **form).weights


@needs_compiler
@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_merged_weights_are_quantized(folder, merged, tmp_path, quant_type):
    expected = export_language(merged, tmp_path / "expected", quant_type=quant_type)
    found = export_language(folder, tmp_path / "found", quant_type=quant_type, lora=ADAPTERS)
    assert found.weights == expected.weights


def test_the_flag(folder, tmp_path, monkeypatch):
    named = shutil.copytree(LORA / "paddlenlp", tmp_path / "lr=2")
    for command, to in (
        ("export-vision", ["--save_path", str(tmp_path / "v" / "v")]),
        ("export-language", ["--output_path", str(tmp_path / "t")]),
    ):
        lora = ["--lora", f"{LORA / 'peft'}=5e-1", "--lora", f"{named}=1"]
        model = ["--model_name_or_path", str(folder), "--engine", "portable"]
        monkeypatch.setattr(sys, "argv", ["qwenvl", command, *model, *to, *lora])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    vision, language = read_manifest(tmp_path / "v" / "v"), read_manifest(tmp_path / "t" / "model")
    check_pair(vision, language)
    assert [(one.name, one.weight) for one in language.lora] == [("peft", 0.5), ("lr=2", 1.0)]
    assert len({one.fingerprint for one in language.lora}) == 2
    assert vision.lora == language.lora
    assert vision.model == Checkpoint(folder, ADAPTERS).fingerprint()


@needs_compiler
def test_stages_of_different_merges_are_told_apart(folder, tmp_path):
    """A vision stage fits the language stages whose adapters leave it unchanged, and no others."""
    language_only, both = LORA / "paddlenlp", LORA / "peft"
    plain, merged = (
        export_vision(folder, tmp_path / f"v{i}" / "v", engine="portable", lora=lora)
        for i, lora in enumerate(([language_only], [both]))
    )
    languages = [
        export_language(folder, tmp_path / f"t{i}", quant_type="weight_only_int8", lora=lora)
        for i, lora in enumerate(([], [language_only], [both], [(both, 0.5)]))
    ]
    for vision, fitting in ((plain, (True, True, False, False)), (merged, (False, False, True, False))):
        for language, fits in zip(languages, fitting):
            if fits:
                check_pair(vision, language)
            else:
                with pytest.raises(QwenVLError, match="with the same --lora"):
                    check_pair(vision, language)


def test_the_merge_holds_one_tensor_at_a_time(tmp_path):
    halves = [pair(f"transformer.h.{i}.attn.c_attn", 128, 384) for i in range(2)]
    adapter = make_peft(tmp_path / "adapter", {**halves[0], **halves[1]})
    checkpoint = Checkpoint(write_base(tmp_path / "model"), [adapter])
    tracemalloc.start()
    for _ in checkpoint.tensors(checkpoint.language, "float32"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = base.weights()["h.0.attn.c_attn.weight"].nbytes
    # Of a tensor: the stored and the merged values, the update and its scaled halves.
    assert peak < 3.5 * largest
