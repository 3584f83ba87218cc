"""Atomic export: all files of a stage are replaced or none, however the export ends."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file, save_file

from paddlemix_qwenvl_plugin.artifact.verify import verify
from paddlemix_qwenvl_plugin.export import export
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.tiny.make import make_tiny
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# Killed while the weights are written, the longest part of a large export.
KILLED = """
import os, signal, sys
from paddlemix_qwenvl_plugin.export import export
export.write_params = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
export.export_language(sys.argv[1], sys.argv[2], "qwen", engine="portable")
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model that differs from the exported tiny one in weights, config and vocabulary."""
    make_tiny(tmp_path / "other", seed=5)
    for name in ("config.json", "qwen.tiktoken"):
        path = tmp_path / "other" / name
        path.write_text(path.read_text() + "\n")
    return tmp_path / "other"


@pytest.fixture
def text(tiny_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_exported / "text", tmp_path / "text"))


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


@pytest.mark.parametrize("cause", ["weights", "disk"])
def test_a_failed_export_leaves_the_good_one(
    cause: str, other: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(text)
    if cause == "disk":

        def full(path: Path, *rest: object) -> None:
            path.write_bytes(bytes(1000))
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(export, "write_params", full)
    else:
        tensors = load_file(other / "model.safetensors")
        name = next(name for name in tensors if name.endswith("ln_f.weight"))
        tensors[name][3] = np.nan
        save_file(tensors, str(other / "model.safetensors"))
    with pytest.raises((QwenVLError, OSError), match=r"ln_f\.weight: 1 of its values|No space left"):
        export_language(other, text, "qwen", engine="portable")
    assert contents(text) == before
    assert leftovers(text) == []


def test_a_killed_export_leaves_the_good_one_and_is_cleaned_up(other: Path, text: Path) -> None:
    before = contents(text)
    command = [sys.executable, "-c", KILLED, str(other), str(text)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert contents(text) == before
    [left] = leftovers(text)
    foreign = text / ".export-other-1234"
    foreign.mkdir()
    (foreign / "lock").touch()
    in_use = text / ".export-qwen-in-use"
    in_use.mkdir()
    # A separate lock object, as of another process.
    with FileLock(in_use / "lock"):
        export_language(other, text, "qwen", engine="portable")
    assert set(leftovers(text)) == {foreign, in_use}
    assert left not in leftovers(text)
    verify(text / "qwen")
    assert (text / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert (text / "qwen.tiktoken").read_bytes() == (other / "qwen.tiktoken").read_bytes()


@pytest.mark.parametrize("prefix", ["config", "tokenizer_config", "generation_config"])
def test_a_prefix_that_would_overwrite_the_model(prefix: str, other: Path, tmp_path: Path) -> None:
    before = contents(other)
    for out in (other, tmp_path / "new"):
        with pytest.raises(UsageError, match=rf"{prefix}\.json; name another prefix"):
            export_language(other, out, prefix, engine="portable")
        with pytest.raises(UsageError, match=rf"{prefix}\.json; name another prefix"):
            export_vision(other, out / prefix, engine="portable")
    assert contents(other) == before
    assert not (tmp_path / "new").exists()


def test_a_file_of_the_model_by_another_path(other: Path, tmp_path: Path) -> None:
    (other / "notes.json").write_text("mine")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(UsageError, match=r"notes\.json"):
        export_vision(other, tmp_path / "link" / "notes", engine="portable")
    assert (other / "notes.json").read_text() == "mine"


def test_exporting_into_the_model_folder_twice(other: Path) -> None:
    for _ in range(2):
        export_language(other, other, "qwen", engine="portable")
        verify(other / "qwen")
    assert (other / "config.json").read_text().endswith("\n\n")
    assert leftovers(other) == []


def test_another_models_files_are_left_alone(other: Path, text: Path, tmp_path: Path) -> None:
    """The next export replaces files of an earlier export, but not those of a model."""
    third = tmp_path / "third"
    make_tiny(third, seed=6)
    before = contents(third)
    with pytest.raises(UsageError, match=r"third/config\.json: exists, and no export wrote it"):
        export_language(other, third, "qwen", engine="portable")
    assert contents(third) == before
    export_language(other, text, "qwen", engine="portable")
    assert (text / "config.json").read_bytes() == (other / "config.json").read_bytes()
