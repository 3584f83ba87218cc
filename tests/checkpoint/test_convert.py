"""A converted folder is the same model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from folders import renamed, write
from safetensors.numpy import load_file

from paddlemix_qwenvl_plugin import UsageError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.convert import convert


def test_shards_and_names(golden, tmp_path):
    """From Hugging Face's form; read back by the safetensors library."""
    model = golden("b")
    config = model.folder / "config.json"
    source = write(
        tmp_path / "hf", config, renamed(model.weights, "huggingface", True), "sharded-safetensors"
    )
    (source / "qwen.tiktoken").write_text("vocabulary")
    target = tmp_path / "converted"
    convert(source, target, "float16", max_shard_bytes=1_000_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        shard = load_file(str(target / file))
        assert len(shard) == 1 or sum(value.nbytes for value in shard.values()) <= 1_000_000
        assert dict.fromkeys(shard, file) == {n: f for n, f in index["weight_map"].items() if f == file}
        found.update(shard)
    assert set(found) == set(model.weights)
    for name, value in model.weights.items():  # the golden weights are float16 numbers
        np.testing.assert_array_equal(found[name], value.astype(np.float16))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert (target / "qwen.tiktoken").read_text() == "vocabulary"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["converted", "hf"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(golden, tmp_path, dtype):
    model = golden("a")
    convert(model.folder, tmp_path / "c", dtype)
    checkpoint = Checkpoint(tmp_path / "c")
    assert checkpoint.dtype == dtype
    original = Checkpoint(model.folder)
    specs = {**checkpoint.language, **checkpoint.vision}
    expected = dict(original.tensors(specs, dtype))
    for name, value in checkpoint.tensors(specs, dtype):
        np.testing.assert_array_equal(value, expected[name])


def test_existing_target_is_left_alone(golden, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        convert(golden("a").folder, tmp_path)
    assert list(tmp_path.iterdir()) == []
