"""`convert` writes the same model in another naming scheme, storage type or number of shards."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil

import numpy as np
import pytest
from folders import renamed, split_into_ranks, write
from quantized_folders import Variant, copy_tool_folder, write_quantized
from safetensors.numpy import load_file
from torch_files import write_bin, write_legacy

from paddlemix_qwenvl_plugin import UsageError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.convert import convert


def test_shards_and_names(golden, tmp_path):
    """Converted from Hugging Face's form; the safetensors library reads the result."""
    model = golden("b")
    config = model.folder / "config.json"
    source = write(
        tmp_path / "hf", config, renamed(model.weights, "huggingface", transpose=True), "sharded-safetensors"
    )
    (source / "qwen.tiktoken").write_text("vocabulary")
    target = tmp_path / "converted"
    convert(source, target, "float16", max_shard_bytes=1_000_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(str(target / file))
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 1_000_000
        assert dict.fromkeys(shard, file) == {
            name: value for name, value in index["weight_map"].items() if value == file
        }
        found.update(shard)
    assert set(found) == set(model.weights)
    for name, value in model.weights.items():  # the golden weights are float16 numbers
        np.testing.assert_array_equal(found[name], value.astype(np.float16))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert (target / "qwen.tiktoken").read_text() == "vocabulary"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "hf"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(golden, tmp_path, dtype):
    model = golden("a")
    convert(model.folder, tmp_path / "c", dtype)
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.dtype == dtype
    original = Checkpoint(model.folder)
    specs = {**checkpoint.language, **checkpoint.vision}
    expected = dict(original.tensors(specs, dtype))
    for name, value in checkpoint.tensors(specs, dtype):
        np.testing.assert_array_equal(value, expected[name])


def stored_tensors(folder):
    """The tensors in the files of a folder: name -> (dtype, shape, sha256 of the values, framework in the metadata)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        framework = header.pop("__metadata__", {}).get("format")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            values = content[length + start : length + end]
            found[name] = (entry["dtype"], entry["shape"], hashlib.sha256(values).hexdigest(), framework)
    return found


def without_framework(tensors):
    return {name: entry[:3] for name, entry in tensors.items()}


SOURCES = {
    "safetensors": lambda folder, config, weights: write(folder, config, weights, "safetensors"),
    "pdparams": lambda folder, config, weights: write(folder, config, weights, "sharded-pdparams"),
    "bin": lambda folder, config, weights: write_torch(folder, config, weights, write_bin),
    "bin before PyTorch 1.6": lambda folder, config, weights: write_torch(
        folder, config, weights, write_legacy
    ),
    "ranks": lambda folder, config, weights: write_ranks(folder, config, weights),
}


def write_torch(folder, config, weights, write_file):
    folder.mkdir()
    shutil.copyfile(config, folder / "config.json")
    write_file(folder / "pytorch_model.bin", weights, "float32")
    return folder


def write_ranks(folder, config, weights):
    folder.mkdir()
    content = {**json.loads(config.read_text()), "tensor_parallel_degree": 2, "tensor_parallel_rank": 0}
    (folder / "config.json").write_text(json.dumps(content))
    for number, rank in enumerate(split_into_ranks(weights, 2)):
        (folder / f"model_state.tp0{number}.pdparams").write_bytes(pickle.dumps(rank, 4))
    return folder


@pytest.mark.parametrize("form", SOURCES)
def test_from_every_form_to_every_scheme(golden, tmp_path, form):
    """Names and layouts are those of `renamed`, values are unchanged.

    A second conversion, to PaddleMIX's scheme, gives the same tensors as the direct one.
    """
    model = golden("a")
    source = SOURCES[form](tmp_path / "source", model.folder / "config.json", model.weights)
    for to in ("huggingface", "paddlemix", "static"):
        target = tmp_path / to
        convert(source, target, to=to, max_shard_bytes=1_000_000)
        framework = "pt" if to == "huggingface" else "pd"
        expected = {
            name: ("F32", list(value.shape), hashlib.sha256(value.tobytes()).hexdigest(), framework)
            for name, value in renamed(model.weights, to, transpose=to == "huggingface").items()
        }
        assert stored_tensors(target) == expected
        convert(target, tmp_path / f"back-{to}")
    for to in ("huggingface", "paddlemix", "static"):
        assert stored_tensors(tmp_path / f"back-{to}") == stored_tensors(tmp_path / "paddlemix")
    assert "tensor_parallel_degree" not in (tmp_path / "static" / "config.json").read_text()


def test_every_tensor_keeps_its_dtype(golden, tmp_path):
    """Some folders have float32 norms among half-precision matrices."""
    model = golden("a")
    weights = {
        name: value if value.ndim == 1 else value.astype(np.float16) for name, value in model.weights.items()
    }
    source = write(tmp_path / "mixed", model.folder / "config.json", weights, "safetensors")
    convert(source, tmp_path / "huggingface", to="huggingface")
    convert(tmp_path / "huggingface", tmp_path / "back", to="paddlemix")
    assert without_framework(stored_tensors(tmp_path / "back")) == without_framework(stored_tensors(source))


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: copy_tool_folder("auto_gptq", folder),
        lambda folder: copy_tool_folder("auto_awq", folder),
        lambda folder: write_quantized(folder, Variant(bits=8, group=64, act_order=True)),
    ],
    ids=["auto_gptq", "auto_awq", "8 bits with act-order"],
)
def test_quantized_folders(tmp_path, make):
    """Integers, scales and zero points are unchanged in each naming scheme, and in the folder converted back."""
    make(tmp_path / "model")
    original = without_framework(stored_tensors(tmp_path / "model"))
    for to, prefix in (
        ("static", "qwen."),
        ("paddlemix", "transformer.llm."),
        ("huggingface", "transformer."),
    ):
        convert(tmp_path / "model", tmp_path / to, to=to)
        found = without_framework(stored_tensors(tmp_path / to))
        quantized = [name for name in original if re.search(r"qweight|qzeros|scales|g_idx", name)]
        assert quantized
        for name in quantized:
            assert found[name.replace("transformer.", prefix, 1)] == original[name]
        assert (
            Checkpoint(tmp_path / to).quantized.quant_type
            == Checkpoint(tmp_path / "model").quantized.quant_type
        )
        convert(tmp_path / to, tmp_path / f"back-{to}", to="huggingface")
        assert without_framework(stored_tensors(tmp_path / f"back-{to}")) == original


def test_a_tied_lm_head_is_written(golden, tmp_path):
    """PaddleMIX's class always has a separate lm_head."""
    model = golden("a")
    weights = {name: value for name, value in model.weights.items() if name != "lm_head.weight"}
    source = write(tmp_path / "tied", model.folder / "config.json", weights, "safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(source, tmp_path / "converted")
    wte = weights["transformer.llm.wte.weight"]
    [shard] = (tmp_path / "converted").glob("*.safetensors")
    np.testing.assert_array_equal(load_file(str(shard))["lm_head.weight"], wte.T)


def test_copied_files(golden, tmp_path):
    """The model's tokenizer, configs, code and README are copied; other weights, exports, training state are not."""
    source = write(tmp_path / "a", golden("a").folder / "config.json", golden("a").weights, "safetensors")
    copied = (
        "qwen.tiktoken",
        "generation_config.json",
        "modeling_qwen.py",
        "README.md",
        "tokenizer.py",
    )
    others = (
        "optimizer.pdopt",
        "optimizer.pt",
        "scaler.pth",
        "training_args.bin",
        "qwen.pdiparams",
        "qwen.pdmodel",
        "qwen.json",
        "qwen.fused.json",
        "qwen.manifest.json",
        "model_state.tp00.pdparams",
        "pytorch_model.bin.index.json",
    )
    for name in (*copied, *others):
        (source / name).write_text(f"content of {name}")
    convert(source, tmp_path / "b")
    names = {path.name for path in (tmp_path / "b").iterdir() if "safetensors" not in path.name}
    assert names == {"config.json", *copied}
    assert (tmp_path / "b" / "README.md").read_text() == "content of README.md"


def test_an_unknown_scheme_is_refused(golden, tmp_path):
    with pytest.raises(UsageError, match="--to pytorch: must be one of paddlemix, static, huggingface"):
        convert(golden("a").folder, tmp_path / "c", to="pytorch")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused(golden, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        convert(golden("a").folder, tmp_path)
    assert list(tmp_path.iterdir()) == []
