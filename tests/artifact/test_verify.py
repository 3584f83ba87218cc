"""Damaged exported stages: what opening a stage detects, and what `qwenvl verify` detects."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corrupted import corrupt

from paddlemix_qwenvl_plugin.artifact.manifest import (
    Manifest,
    check_weights,
    digest_of_samples,
    manifest_path,
    params_path,
    read_manifest,
)
from paddlemix_qwenvl_plugin.artifact.verify import verify
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.tiny.make import make_tiny
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# `digest_of_samples` reads 64 samples of SAMPLE bytes, at equal distances from the beginning to the end of the file.
SAMPLE = 1 << 16


@pytest.fixture
def prefix(tiny_exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_exported / "text", tmp_path / "text")
    return tmp_path / "text" / "qwen"


def flip_bit(path: Path, offset: int) -> None:
    """Flip a bit of the byte at `offset`."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def test_weights_of_another_model(prefix: Path, tmp_path: Path) -> None:
    """Weights of the same size and config: only the digest tells them from those that the manifest describes."""
    make_tiny(tmp_path / "model", seed=2)
    export_language(tmp_path / "model", tmp_path / "other", "qwen")
    other = params_path(tmp_path / "other" / "qwen")
    assert other.stat().st_size == params_path(prefix).stat().st_size
    shutil.copyfile(other, params_path(prefix))
    with pytest.raises(QwenVLError, match=r"qwen\.pdiparams: not the weights that were exported"):
        check_weights(params_path(prefix), read_manifest(prefix, "language"))


def test_opening_a_small_stage_detects_a_flipped_bit_between_the_samples(prefix: Path) -> None:
    """A file of up to 64 MiB is read completely."""
    path, size = params_path(prefix), params_path(prefix).stat().st_size
    starts = [(size - SAMPLE) * i // 63 for i in range(64)]
    # A byte between each two samples that do not touch.
    outside = [
        start + SAMPLE + 3 for start, following in zip(starts, starts[1:]) if following > start + SAMPLE + 3
    ]
    assert len(outside) > 30
    for offset in outside[::10]:
        before = digest_of_samples(path)
        flip_bit(path, offset)
        assert digest_of_samples(path) == before
        with pytest.raises(QwenVLError, match="not the weights that were exported"):
            check_weights(path, read_manifest(prefix, "language"))
        flip_bit(path, offset)
    check_weights(path, read_manifest(prefix, "language"))


def test_opening_a_large_stage_compares_the_samples(prefix: Path) -> None:
    path = params_path(prefix)
    with path.open("r+b") as file:
        file.truncate(40 << 30)
    data = json.loads(manifest_path(prefix).read_text())
    data["weights"]["bytes"] = 40 << 30
    manifest = Manifest.model_validate({**data, "weights_samples": digest_of_samples(path)})
    check_weights(path, manifest)
    flip_bit(path, (40 << 30) - 1)
    with pytest.raises(QwenVLError, match="not the weights that were exported"):
        check_weights(path, manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_verify_finds_weights_that_are_not_finite(
    dtype: str, value: float, tiny_exported: Path, tmp_path: Path
) -> None:
    """The digests are right: `corrupt` updates them in the manifest."""
    export_vision(tiny_exported / "model", tmp_path / "vision", dtype, "portable")
    verify(tmp_path / "vision")
    corrupt(tmp_path / "vision", "visual.conv1.weight", value)
    with pytest.raises(QwenVLError, match=r"visual\.conv1\.weight: 1 of its values are infinite"):
        verify(tmp_path / "vision")


def test_samples_are_spread_and_bounded(tmp_path: Path) -> None:
    """In a sparse file of 40 GiB, a changed byte is detected at the ends or in a sample, but not between samples."""
    path, size = tmp_path / "large", 40 << 30
    with path.open("wb") as file:
        file.truncate(size)
    before = digest_of_samples(path)
    for offset in (0, size - 1, (size - SAMPLE) * 31 // 63 + 5):
        flip_bit(path, offset)
        assert digest_of_samples(path) != before
        flip_bit(path, offset)
        assert digest_of_samples(path) == before
    flip_bit(path, size // 200)
    assert digest_of_samples(path) == before  # only `verify` reads this byte


def test_the_samples_of_a_small_file_cover_it(tmp_path: Path) -> None:
    """Up to 4 MiB, the size of 64 samples."""
    path = tmp_path / "small"
    path.write_bytes(np.random.RandomState(0).bytes(3 << 20))
    before = digest_of_samples(path)
    for offset in np.random.RandomState(1).randint(0, 3 << 20, 200):
        flip_bit(path, int(offset))
        assert digest_of_samples(path) != before
        flip_bit(path, int(offset))


@pytest.mark.parametrize("name", ["qwen.pdiparams", "qwen.step.json", "qwen.pdmodel"])
def test_verify_finds_a_flipped_bit(name: str, prefix: Path) -> None:
    assert verify(prefix) == read_manifest(prefix, "language")
    path = prefix.with_name(name)
    flip_bit(path, path.stat().st_size // 3)
    with pytest.raises(QwenVLError, match=f"{name}: not what qwen.manifest.json describes"):
        verify(prefix)
    path.unlink()
    with pytest.raises(QwenVLError, match=f"{name}: missing"):
        verify(prefix)


def test_a_manifest_without_samples_opens(prefix: Path) -> None:
    data = json.loads(manifest_path(prefix).read_text())
    del data["weights_samples"]
    manifest_path(prefix).write_text(json.dumps({**data, "contract": 2}))
    check_weights(params_path(prefix), read_manifest(prefix, "language"))


def test_the_command(prefix: Path) -> None:
    command = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli", "verify", str(prefix)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{prefix}: the language stage is as it was exported (6.7 MB)\n"
