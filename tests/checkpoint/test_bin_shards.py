"""PyTorch .bin shards, as Hugging Face publishes this model, give the same tensors as every other format.

The files are written without PyTorch: a zip of one pickle (`data.pkl`) and the tensors' raw values.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from importlib.util import find_spec
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from folders import renamed

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast

pytestmark = pytest.mark.skipif(
    find_spec("paddlenlp") is None,
    reason="PaddleNLP reads .bin files and is missing: pip install -e '.[cpu,dev,paddlenlp]'",
)
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def stand_in(module, name):
    """What a pickle refers to as `module.name`."""
    found = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, found)
    return found


class Pickler(pickle.Pickler):
    """Pickles arrays as PyTorch does tensors: by a storage that lies beside the pickle, shape and strides."""

    def __init__(self, file, dtype):
        super().__init__(file, protocol=2)
        self.storages = []
        self.storage_type = stand_in("torch", STORAGES[dtype])
        self.rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")

    def persistent_id(self, value):
        if not isinstance(value, memoryview):
            return None
        self.storages.append(value)
        return "storage", self.storage_type, str(len(self.storages) - 1), "cpu", len(value)

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        strides = tuple(stride // value.itemsize for stride in value.strides)
        return self.rebuild, (memoryview(value.ravel()), 0, value.shape, strides, False, OrderedDict())


def write_bin(path, weights, dtype):
    body = io.BytesIO()
    # Only while pickling: einops would take the stand-in for PyTorch.
    with mock.patch.dict(sys.modules, {name: ModuleType(name) for name in ("torch", "torch._utils")}):
        pickler = Pickler(body, dtype)
        pickler.dump(OrderedDict(weights))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data.pkl", body.getvalue())
        file.writestr(f"{path.stem}/byteorder", "little")
        for i, storage in enumerate(pickler.storages):
            file.writestr(f"{path.stem}/data/{i}", storage.tobytes())
        file.writestr(f"{path.stem}/version", "3\n")


def write_folder(folder, config, weights, dtype):
    """Two shards and their index, under Hugging Face's names, linear weights as [out, in]."""
    shutil.copyfile(config, folder / "config.json")
    stored = renamed(weights, "huggingface", transpose=True)
    names = list(stored)
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        shard = {name: cast(stored[name], "float32", dtype, name) for name in names[i::2]}
        write_bin(folder / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", STORAGES)
def test_the_tensors_of_the_shards(golden, tmp_path, dtype):
    model = golden("b")
    write_folder(tmp_path, model.folder / "config.json", model.weights, dtype)
    shards, original = Checkpoint(tmp_path), Checkpoint(model.folder)
    assert shards.dtype == dtype
    read = dict(shards.tensors({**shards.language, **shards.vision}, dtype))
    expected = dict(original.tensors({**original.language, **original.vision}, dtype))
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)


def test_a_cut_shard_is_named(golden, tmp_path):
    model = golden("b")
    write_folder(tmp_path, model.folder / "config.json", model.weights, "float32")
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(QwenVLError, match=r"00002-of-00002\.bin: not a PyTorch weight file, or truncated"):
        Checkpoint(tmp_path)
