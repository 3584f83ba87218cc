"""PyTorch .bin shards, Hugging Face's format of this model, give the same tensors as the golden folder's files.

Damaged and crafted files are refused. The tests write shards without PyTorch (torch_files.py). PyTorch itself wrote the
small files of tests/golden/torch.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from folders import renamed
from torch_files import pickle_of, replace_pickle, write_bin, write_legacy

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint import torch_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast

WRITTEN_BY_TORCH = Path(__file__).parents[1] / "golden" / "torch"
DTYPES = ("float32", "float16", "bfloat16")


def write_folder(folder, config, weights, dtype, write=write_bin):
    """Write two shards and their index, with Hugging Face's names and linear weights as [out, in]."""
    shutil.copyfile(config, folder / "config.json")
    stored = renamed(weights, "huggingface", transpose=True)
    names = list(stored)
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        shard = {name: cast(stored[name], "float32", dtype, name) for name in names[i::2]}
        write(folder / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("write", [write_bin, write_legacy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tensors_of_the_shards(golden, tmp_path, dtype, write):
    model = golden("b")
    write_folder(tmp_path, model.folder / "config.json", model.weights, dtype, write)
    shards, original = Checkpoint(tmp_path), Checkpoint(model.folder)
    assert shards.dtype == dtype
    read = dict(shards.tensors({**shards.language, **shards.vision}, dtype))
    expected = dict(original.tensors({**original.language, **original.vision}, dtype))
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)


@pytest.mark.parametrize("write", [write_bin, write_legacy])
def test_arrays_that_are_views(tmp_path, write):
    """The files of torch_files.py hold the values of an array, whatever its memory layout."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    views = {"transposed": base.T, "part": base[1:, ::2], "scalar": base[1, 1, None].reshape(())}
    path = tmp_path / "a.bin"
    write(path, views, "float32")
    header = torch_file.read_header(path)
    for name, view in views.items():
        np.testing.assert_array_equal(torch_file.read_tensor(path, header[name]), view, err_msg=name)


def test_the_error_names_a_truncated_shard(golden, tmp_path):
    model = golden("b")
    write_folder(tmp_path, model.folder / "config.json", model.weights, "float32")
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(QwenVLError, match=r"00002-of-00002\.bin: not a PyTorch weight file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["", "-before-1.6"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_files_written_by_pytorch(dtype, form):
    path = WRITTEN_BY_TORCH / f"{dtype}{form}.bin"
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


def test_float8():
    """Ones, read as their bits; PyTorch stores them in an untyped storage."""
    path = WRITTEN_BY_TORCH / "float8.bin"
    header = torch_file.read_header(path)
    assert header["eighth"].dtype == "float8_e4m3fn"
    assert torch_file.read_tensor(path, header["eighth"]).tolist() == [0x38, 0x38]


def test_a_state_dict():
    path = WRITTEN_BY_TORCH / "state_dict.bin"
    header = torch_file.read_header(path)
    assert torch_file.read_tensor(path, header["weight"]).tolist() == [[2.0, 2.0]] * 3
    assert torch_file.read_tensor(path, header["bias"]).tolist() == [1.0] * 3


def test_a_pickled_module_is_refused():
    message = "its pickle imports torch.nn.modules.linear.Linear; only tables of tensors are read"
    with pytest.raises(QwenVLError) as caught:
        torch_file.read_header(WRITTEN_BY_TORCH / "module.bin")
    assert message in str(caught.value)


def with_pickle(path, change):
    """Write a copy of float32.bin to `path`, with its pickle replaced by `change(pickle)`."""
    source = WRITTEN_BY_TORCH / "float32.bin"
    return replace_pickle(source, path, change(pickle_of(source)))


class Evil:
    """Pickled as a call that creates a folder."""

    def __init__(self, created):
        self.created = created

    def __reduce__(self):
        return os.mkdir, (str(self.created),)


def test_code_in_a_pickle_does_not_run(tmp_path):
    created = tmp_path / "ran"
    path = with_pickle(tmp_path / "evil.bin", lambda _: pickle.dumps({"a": Evil(created)}, protocol=2))
    with pytest.raises(QwenVLError, match=r"its pickle imports \w+\.mkdir"):
        torch_file.read_header(path)
    assert not created.exists()


# Replaced in the pickle: the shape (3, 20) or the strides (20, 1). K pushes an integer of one byte, J one of four
# bytes, and \x86 makes a tuple of two.
@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b"K\x03K\x14\x86", b"K\x04K\x14\x86", id="one row more"),
        pytest.param(b"K\x14K\x01\x86", b"K\x15K\x01\x86", id="larger stride of rows"),
        pytest.param(b"K\x14K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", id="negative stride of rows"),
    ],
)
def test_no_reading_beyond_the_storage(tmp_path, old, new):
    def change(pickled):
        assert old in pickled
        return pickled.replace(old, new, 1)

    with pytest.raises(QwenVLError, match=r"whole reaches beyond its 240 bytes|a tensor has no valid shape"):
        torch_file.read_header(with_pickle(tmp_path / "reaching.bin", change))


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    """An expanded tensor: 4 rows with a stride of 0."""

    def change(pickled):
        strides = pickled.replace(b"K\x14K\x01\x86", b"K\x00K\x01\x86", 1)
        assert strides != pickled
        return strides.replace(b"K\x03K\x14\x86", b"K\x04K\x14\x86", 1)

    message = r"whole repeats values of its 240 bytes; save it again with \.contiguous\(\)"
    with pytest.raises(QwenVLError, match=message):
        torch_file.read_header(with_pickle(tmp_path / "expanded.bin", change))


@pytest.mark.parametrize("form", ["", "-before-1.6"])
def test_every_truncated_file_is_refused(tmp_path, form):
    content = (WRITTEN_BY_TORCH / f"float32{form}.bin").read_bytes()
    path = tmp_path / "prefix.bin"
    for n in range(0, len(content), 7):  # every seventh length, for speed
        path.write_bytes(content[:n])
        with pytest.raises(QwenVLError, match="not a PyTorch weight file, or truncated"):
            torch_file.read_header(path)


def test_changed_values_are_detected(tmp_path):
    """The archive has a checksum of each storage."""
    content = bytearray((WRITTEN_BY_TORCH / "float32.bin").read_bytes())
    values = np.arange(60, dtype="<f4").tobytes()
    content[content.index(values) + 9] ^= 1
    path = tmp_path / "changed.bin"
    path.write_bytes(content)
    header = torch_file.read_header(path)
    with pytest.raises(QwenVLError, match="cannot be read"):
        torch_file.read_tensor(path, header["whole"])
