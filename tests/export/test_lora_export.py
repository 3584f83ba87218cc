"""An export with `--lora` writes the same weights as an export of a folder with merged weights.

Also which stages with merged adapters fit together, and the memory that a merge takes.
"""

from __future__ import annotations

import shutil
import sys
import tracemalloc

import pytest
from engines import needs_compiler
from lora_folders import LORA, base, make_peft, update_tensors, write_base
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


def test_the_parameter_files_equal_those_of_the_merged_folder(folder, merged, tmp_path):
    options = {"dtype": "bfloat16", "engine": "portable"}
    vision = export_vision(folder, tmp_path / "v" / "v", lora=ADAPTERS, **options)
    assert vision.weights == export_vision(merged, tmp_path / "w" / "v", **options).weights
    language = export_language(folder, tmp_path / "t", lora=ADAPTERS, **options)
    assert language.weights == export_language(merged, tmp_path / "u", **options).weights


@needs_compiler
@pytest.mark.parametrize("quant_type", ["weight_only_int8", "weight_only_int4"])
def test_merged_weights_are_quantized(folder, merged, tmp_path, quant_type):
    expected = export_language(merged, tmp_path / "expected", quant_type=quant_type)
    found = export_language(folder, tmp_path / "found", quant_type=quant_type, lora=ADAPTERS)
    assert found.weights == expected.weights


def test_the_flag(folder, tmp_path, monkeypatch):
    adapter = shutil.copytree(LORA / "paddlenlp", tmp_path / "lr=2")
    for command, target in (
        ("export-vision", ["--save_path", str(tmp_path / "v" / "v")]),
        ("export-language", ["--output_path", str(tmp_path / "t")]),
    ):
        # FOLDER=WEIGHT: the second folder has a = in its name.
        lora = ["--lora", f"{LORA / 'peft'}=5e-1", "--lora", f"{adapter}=1"]
        model = ["--model_name_or_path", str(folder), "--engine", "portable"]
        monkeypatch.setattr(sys, "argv", ["qwenvl", command, *model, *target, *lora])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == 0
    vision, language = read_manifest(tmp_path / "v" / "v"), read_manifest(tmp_path / "t" / "model")
    check_pair(vision, language)
    assert [(adapter.name, adapter.weight) for adapter in language.lora] == [("peft", 0.5), ("lr=2", 1.0)]
    assert len({adapter.fingerprint for adapter in language.lora}) == 2
    assert vision.lora == language.lora
    assert vision.model == Checkpoint(folder, ADAPTERS).fingerprint()


@needs_compiler
def test_stages_with_different_adapters_do_not_fit(folder, tmp_path):
    """A vision stage fits a language stage if both have the same merged updates of vision weights."""
    language_only, both_stages = LORA / "paddlenlp", LORA / "peft"
    unchanged, changed = (
        export_vision(folder, tmp_path / f"v{i}" / "v", engine="portable", lora=lora)
        for i, lora in enumerate(([language_only], [both_stages]))
    )
    languages = [
        export_language(folder, tmp_path / f"t{i}", quant_type="weight_only_int8", lora=lora)
        for i, lora in enumerate(([], [language_only], [both_stages], [(both_stages, 0.5)]))
    ]
    for vision, expected in ((unchanged, (True, True, False, False)), (changed, (False, False, True, False))):
        for language, fits in zip(languages, expected):
            if fits:
                check_pair(vision, language)
            else:
                with pytest.raises(QwenVLError, match="with the same --lora"):
                    check_pair(vision, language)


def test_a_merge_has_one_tensor_at_a_time_in_memory(tmp_path):
    tensors = [update_tensors(f"transformer.h.{i}.attn.c_attn", 128, 384) for i in range(2)]
    adapter = make_peft(tmp_path / "adapter", {**tensors[0], **tensors[1]})
    checkpoint = Checkpoint(write_base(tmp_path / "model"), [adapter])
    tracemalloc.start()
    for _ in checkpoint.tensors(checkpoint.language, "float32"):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = base.weights()["h.0.attn.c_attn.weight"].nbytes
    # Of one tensor: the stored values, the merged values, the update, and its scaled factors A and B.
    assert peak < 3.5 * largest
