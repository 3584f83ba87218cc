"""Atomic exports: one that fails or is killed while it writes its files changes no file of an earlier one.

No export replaces files of a checkpoint, its model's or another's. A kill in the short time in which the complete files
are moved into place is not tested: it can leave a stage without a manifest.
"""

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

# An export that is killed at the beginning of the weights, whose writing takes longest in a large export.
KILLED_EXPORT = """
import os, signal, sys
from paddlemix_qwenvl_plugin.export import export
export.write_params = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
export.export_language(sys.argv[1], sys.argv[2], "qwen", engine="portable")
"""


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model with other weights than the exported tiny one, and one newline more in its config and vocabulary."""
    make_tiny(tmp_path / "other", seed=5)
    for name in ("config.json", "qwen.tiktoken"):
        path = tmp_path / "other" / name
        path.write_text(path.read_text() + "\n")
    return tmp_path / "other"


@pytest.fixture
def stage_folder(tiny_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_exported / "text", tmp_path / "text"))


def leftovers(folder: Path) -> list[Path]:
    """The temporary folders of exports."""
    return list(folder.glob(".*"))


@pytest.mark.parametrize("cause", ["weights", "disk"])
def test_a_failed_export_changes_no_file(
    cause: str, other: Path, stage_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_contents(stage_folder)
    if cause == "disk":

        def disk_full(path: Path, *arguments: object) -> None:
            path.write_bytes(bytes(1000))
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(export, "write_params", disk_full)
    else:
        tensors = load_file(other / "model.safetensors")
        name = next(name for name in tensors if name.endswith("ln_f.weight"))
        tensors[name][3] = np.nan
        save_file(tensors, str(other / "model.safetensors"))
    with pytest.raises((QwenVLError, OSError), match=r"ln_f\.weight: 1 of its values|No space left"):
        export_language(other, stage_folder, "qwen", engine="portable")
    assert file_contents(stage_folder) == before
    assert leftovers(stage_folder) == []


def test_a_killed_export_changes_no_file_and_the_next_removes_its_leftovers(
    other: Path, stage_folder: Path
) -> None:
    before = file_contents(stage_folder)
    command = [sys.executable, "-c", KILLED_EXPORT, str(other), str(stage_folder)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert file_contents(stage_folder) == before
    assert len(leftovers(stage_folder)) == 1  # of the killed export
    # Temporary folders of an export with another prefix, and of a running export.
    other_prefix = stage_folder / ".export-other-1234"
    other_prefix.mkdir()
    (other_prefix / "lock").touch()
    running = stage_folder / ".export-qwen-running"
    running.mkdir()
    # Held by another lock object, as by another process.
    with FileLock(running / "lock"):
        export_language(other, stage_folder, "qwen", engine="portable")
    assert set(leftovers(stage_folder)) == {other_prefix, running}
    verify(stage_folder / "qwen")
    assert (stage_folder / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert (stage_folder / "qwen.tiktoken").read_bytes() == (other / "qwen.tiktoken").read_bytes()


@pytest.mark.parametrize("prefix", ["config", "tokenizer_config", "generation_config"])
def test_a_prefix_that_names_a_file_of_the_model_is_refused(prefix: str, other: Path, tmp_path: Path) -> None:
    before = file_contents(other)
    for target in (other, tmp_path / "new"):
        with pytest.raises(UsageError, match=rf"{prefix}\.json; name another prefix"):
            export_language(other, target, prefix, engine="portable")
        with pytest.raises(UsageError, match=rf"{prefix}\.json; name another prefix"):
            export_vision(other, target / prefix, engine="portable")
    assert file_contents(other) == before
    assert not (tmp_path / "new").exists()


def test_a_prefix_that_names_a_file_of_the_model_through_a_link_is_refused(
    other: Path, tmp_path: Path
) -> None:
    (other / "notes.json").write_text("mine")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(UsageError, match=r"notes\.json"):
        export_vision(other, tmp_path / "link" / "notes", engine="portable")
    assert (other / "notes.json").read_text() == "mine"


def test_exporting_into_the_model_folder_twice(other: Path) -> None:
    for _ in range(2):
        export_language(other, other, "qwen", engine="portable")
        verify(other / "qwen")
    # The file is still the model's own, which ends with the newline of the fixture.
    assert (other / "config.json").read_text().endswith("\n\n")
    assert leftovers(other) == []


def test_files_of_another_model_are_not_replaced(other: Path, stage_folder: Path, tmp_path: Path) -> None:
    """An export replaces files of an earlier export, but no files of a checkpoint."""
    third = tmp_path / "third"
    make_tiny(third, seed=6)
    before = file_contents(third)
    with pytest.raises(UsageError, match=r"third/config\.json: exists, and no export wrote it"):
        export_language(other, third, "qwen", engine="portable")
    assert file_contents(third) == before
    export_language(other, stage_folder, "qwen", engine="portable")
    assert (stage_folder / "config.json").read_bytes() == (other / "config.json").read_bytes()
