"""Reading .pdparams files: the same tensors as paddle.load, and no code of a crafted file runs."""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint import pdparams_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.cli.main import main


def tensors(dtype: str) -> dict[str, paddle.Tensor]:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4) - 7.5
    arrays = {"cube": values, "row": values[0, 0], "single": values[:1, 0, 0], "wide": values.reshape(1, 24)}
    return {name: paddle.to_tensor(value).astype(dtype) for name, value in arrays.items()}


def read_all(path: Path) -> dict[str, np.ndarray]:
    header = pdparams_file.read_header(path)
    return {name: pdparams_file.read_tensor(path, tensor) for name, tensor in header.items()}


def check(path: Path) -> dict[str, np.ndarray]:
    """Compare the tensors of a file with those that paddle.load reads, and return them."""
    read = read_all(path)
    expected = paddle.load(str(path), return_numpy=True)
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value, err_msg=name)
    return read


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_state_dict(tmp_path: Path, protocol: int, dtype: str) -> None:
    path = tmp_path / "a.pdparams"
    paddle.save(tensors(dtype), str(path), protocol=protocol)
    assert len(check(path)) == 4


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_parameters_of_a_layer(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pdparams"
    paddle.save(paddle.nn.Linear(3, 4).state_dict(), str(path), protocol=protocol)
    assert list(check(path)) == ["weight", "bias"]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_tensors_beside_other_values(tmp_path: Path, protocol: int) -> None:
    """In a dict with other values, paddle.save writes each tensor as a pair of its name and its values."""
    path = tmp_path / "a.pdparams"
    paddle.save({**tensors("float32"), "epoch": 3}, str(path), protocol=protocol)
    with pytest.raises(QwenVLError, match="epoch is not a tensor"):
        pdparams_file.read_header(path)
    paddle.save({**tensors("float32"), "array": np.ones([2, 2], "float32")}, str(path), protocol=protocol)
    assert len(check(path)) == 5


def test_tensors_of_a_static_program(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    owners = tensors("float32")  # a DenseTensor does not own its values
    state = {name: owner.value().get_tensor() for name, owner in owners.items()}
    paddle.save({**state, "array": np.ones([2, 2], "float32")}, str(path))
    assert b"eval" in path.read_bytes()  # Paddle pickles the values as eval("data", {"data": array})
    assert len(check(path)) == 5


@pytest.mark.parametrize("protocol", [2, 3])
def test_large_tensors_that_are_split(tmp_path: Path, protocol: int, monkeypatch: Any) -> None:
    """In protocols 2 and 3 Paddle splits tensors above 2^30 - 1 bytes; for the test, above 20 bytes, five float32."""
    from paddle.framework import io_utils

    source = Path(io_utils.__file__).read_text()
    assert source.count("(2**30 - 1)") == 1
    function = re.search(r"\ndef _unpack_saved_dict.*?return saved_obj\n", source, re.S)
    assert function
    namespace: dict[str, Any] = vars(io_utils).copy()
    exec(function[0].replace("(2**30 - 1)", "20"), namespace)
    monkeypatch.setattr("paddle.framework.io._unpack_saved_dict", namespace["_unpack_saved_dict"])
    path = tmp_path / "a.pdparams"
    paddle.save(tensors("float32"), str(path), protocol=protocol)
    assert b"UnpackBigParamInfor@@" in path.read_bytes()
    assert check(path)["cube"].shape == (2, 3, 4)


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_arrays_written_by_any_numpy(tmp_path: Path, core: str, order: Any, dtype: str) -> None:
    """NumPy 2 renamed the module numpy.core to numpy._core."""
    values = np.asarray(np.arange(6.0).reshape(2, 3), dtype, order=order)
    pickled, n_replaced = re.subn(
        rb"numpy\._?core\.", f"numpy.{core}.".encode(), pickle.dumps({"a": values}, 2)
    )
    assert n_replaced == 1
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickled)
    np.testing.assert_array_equal(read_all(path)["a"], values)


class Evil:
    """Object that is pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


COMMANDS = {
    "export": ["export-vision", "--model_name_or_path", "model", "--save_path", "out/vision"],
    "convert": ["convert", "model", "new"],
    "doctor": ["doctor", "--model_name_or_path", "model"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("indexed", [False, True])
def test_code_in_a_file_does_not_run(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, command: str, indexed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((golden("a").folder / "config.json").read_bytes())
    name = "model_state-00001-of-00001.pdparams" if indexed else "model_state.pdparams"
    if indexed:
        index = {"weight_map": {"lm_head.weight": name}}
        (model / "model_state.pdparams.index.json").write_text(json.dumps(index))
    content = pickle.dumps({"lm_head.weight": Evil(os.system, "touch ran")}, protocol=4)
    (model / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["qwenvl", *COMMANDS[command]])
    with pytest.raises(SystemExit) as caught:
        main()
    printed = "".join(capfd.readouterr())
    assert caught.value.code == 1
    assert f"model/{name}: its pickle imports posix.system; only tables of tensors are read" in printed
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(content)["lm_head.weight"]  # without the restrictions, the code runs
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Evil(eval, "__import__('os').mkdir('ran')", {}), "its pickle evaluates"),
        (Evil(eval, "data.mkdir('ran')", {"data": 1}), "its pickle evaluates"),
        (Evil(getattr, os, "mkdir"), "its pickle imports"),
        (Evil(paddle.load, "other.pdparams"), "its pickle imports paddle"),
        # None, True: mmap_mode, allow_pickle.
        (Evil(np.load, "other.npy", None, True), "its pickle imports numpy"),
        (np.array([os.mkdir], dtype=object), "its pickle imports|holds no numbers"),
        (np.array(["a", None], dtype=object), "an array in it holds no numbers"),
        (np.zeros(2, dtype="f4,f4"), "an array in it holds no numbers"),
    ],
)
def test_other_calls_and_arrays_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "a.pdparams"
    if isinstance(value, Evil) and os in value.call[1]:
        # A module cannot be pickled, but a call that imports it can.
        value = Evil(getattr, Evil(__import__, "os"), "mkdir")
    path.write_bytes(pickle.dumps({"a": value}, 4))
    with pytest.raises(QwenVLError, match=message):
        pdparams_file.read_header(path)


def test_a_file_cannot_change_the_reader(tmp_path: Path) -> None:
    """The opcode BUILD sets attributes, even of a class: here ndarray.__setstate__, used by every later array."""
    path = tmp_path / "a.pdparams"
    path.write_bytes(b"\x80\x02cnumpy\nndarray\nN}X\x0c\x00\x00\x00__setstate__cbuiltins\ntuple\ns\x86b.")
    with pytest.raises(QwenVLError, match="its pickle sets the state of an unexpected object"):
        pdparams_file.read_header(path)
    paddle.save(tensors("float32"), str(path))
    check(path)


def test_a_shape_that_does_not_fit_the_values(tmp_path: Path) -> None:
    content = pickle.dumps({"a": np.arange(6, dtype="<f4").reshape(2, 3)}, 2)
    path = tmp_path / "a.pdparams"
    shape = b"K\x02K\x03\x86"  # (2, 3)
    for changed in (
        b"K\x02K\x04\x86",  # (2, 4)
        b"J\xff\xff\xff\xffK\x06\x86",  # (-1, 6)
        b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86",  # (-1, -6)
    ):
        assert shape in content
        path.write_bytes(content.replace(shape, changed))
        with pytest.raises(QwenVLError, match=r"an array of 24 bytes where|a tensor has no valid shape"):
            pdparams_file.read_header(path)


def test_every_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pdparams"
    paddle.save(tensors("float32"), str(path))
    content = path.read_bytes()
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(QwenVLError, match="not a Paddle weight file"):
            pdparams_file.read_header(path)


def test_a_huge_memo_index_takes_no_memory(tmp_path: Path) -> None:
    """The opcode LONG_BINPUT with a huge index: an unpickler with an array as its memo would allocate 16 GiB."""
    path = tmp_path / "a.pdparams"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))\n"
        "from paddlemix_qwenvl_plugin.checkpoint import pdparams_file\n"
        "pdparams_file.read_header(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stderr.splitlines()[-1].endswith("holds no table of tensors")


def test_a_checkpoint_as_a_reversed_ordered_dict(golden: Any, tmp_path: Path) -> None:
    """The order of the tensors and the type of the dict do not change the fingerprint."""
    model = golden("a")
    (tmp_path / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    state = collections.OrderedDict(reversed(list(model.weights.items())))
    paddle.save(state, str(tmp_path / "model_state.pdparams"), protocol=2)
    read, original = Checkpoint(tmp_path), Checkpoint(model.folder)
    assert read.fingerprint() == original.fingerprint()
