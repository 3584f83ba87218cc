"""PyTorch .bin shards, as Hugging Face publishes this model, give the same tensors as every other format.

The shards are written without PyTorch: a zip of one pickle (`data.pkl`) and the tensors' raw values. PyTorch itself
wrote the small files of tests/golden/torch.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from folders import renamed

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint import torch_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "golden" / "torch"
STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


def stand_in(module, name):
    """Stand-in for an object that a pickle refers to as `module.name`."""
    found = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, found)
    return found


class Pickler(pickle.Pickler):
    """Pickle arrays as PyTorch pickles tensors: storage outside the pickle, shape and strides."""

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
    # Only while pickling: einops would mistake the stand-in for PyTorch.
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
    with pytest.raises(QwenVLError, match=r"00002-of-00002\.bin: not a PyTorch weight file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_pytorch_wrote(dtype):
    path = WRITTEN_BY_TORCH / f"{dtype}.bin"
    base = np.arange(60.0).reshape(3, 20)
    expected = {
        "whole": base,
        "transposed": base.T,
        "part": base[1:, 5:9],
        "scalar": np.array(7.0),
        "empty": np.zeros([0, 4]),
        "parameter": np.full([2, 2], 5.0),
    }
    header = torch_file.read_header(path)
    assert list(header) == list(expected)
    for name, value in expected.items():
        assert header[name].dtype == dtype
        assert header[name].shape == value.shape
        read = torch_file.read_tensor(path, header[name])
        assert read.flags.c_contiguous
        if dtype == "bfloat16":
            read = (read.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(read, value)


def test_integers():
    path = WRITTEN_BY_TORCH / "integers.bin"
    header = torch_file.read_header(path)
    assert header["steps"].dtype == "int64"
    assert torch_file.read_tensor(path, header["steps"]).tolist() == [0, 1, 2]


def test_a_state_dict():
    path = WRITTEN_BY_TORCH / "state_dict.bin"
    header = torch_file.read_header(path)
    assert torch_file.read_tensor(path, header["weight"]).tolist() == [[2.0, 2.0]] * 3
    assert torch_file.read_tensor(path, header["bias"]).tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("module", "its pickle imports torch.nn.modules.linear.Linear; only tables of tensors are read"),
    ],
)
def test_what_is_not_read(name, line):
    with pytest.raises(QwenVLError) as caught:
        torch_file.read_header(WRITTEN_BY_TORCH / f"{name}.bin")
    assert line in str(caught.value)


def with_pickle(path, pickled):
    """A copy of float32.bin with another pickle in it."""
    with zipfile.ZipFile(WRITTEN_BY_TORCH / "float32.bin") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return path


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_pickle_does_not_run(tmp_path):
    mark = tmp_path / "ran"
    path = with_pickle(tmp_path / "evil.bin", lambda _: pickle.dumps({"a": Evil(mark)}, protocol=2))
    with pytest.raises(QwenVLError, match=r"its pickle imports \w+\.mkdir"):
        torch_file.read_header(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x03K\x14\x86", b"K\x04K\x14\x86"),  # one row more
        (b"K\x14K\x01\x86", b"K\x15K\x01\x86"),  # rows further apart
        (b"K\x14K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"),  # backwards, by -1
    ],
)
def test_no_reading_beyond_the_storage(tmp_path, old, new):
    def changed(pickled):
        assert old in pickled
        return pickled.replace(old, new, 1)

    with pytest.raises(QwenVLError, match=r"whole reaches beyond its 240 bytes|a tensor has no valid shape"):
        torch_file.read_header(with_pickle(tmp_path / "reaching.bin", changed))


def test_every_cut_is_refused(tmp_path):
    whole = (WRITTEN_BY_TORCH / "float32.bin").read_bytes()
    path = tmp_path / "cut.bin"
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])
        with pytest.raises(QwenVLError, match="truncated"):
            torch_file.read_header(path)


def test_changed_values_are_noticed(tmp_path):
    """The archive has a checksum of each storage."""
    whole = bytearray((WRITTEN_BY_TORCH / "float32.bin").read_bytes())
    values = np.arange(60, dtype="<f4").tobytes()
    whole[whole.index(values) + 9] ^= 1
    path = tmp_path / "changed.bin"
    path.write_bytes(whole)
    header = torch_file.read_header(path)
    with pytest.raises(QwenVLError, match="cannot be read"):
        torch_file.read_tensor(path, header["whole"])
