"""Full verification of an exported stage: the digests of all files, and that floating-point weights are finite."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paddlemix_qwenvl_plugin.artifact.manifest import (
    FileDigest,
    Manifest,
    manifest_path,
    params_path,
    read_manifest,
)
from paddlemix_qwenvl_plugin.artifact.params_file import n_not_finite, read_tensors
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.progress import track

_CHUNK_VALUES = 1 << 22


def verify(prefix: Path) -> Manifest:
    """Read all files of an exported stage, compare them with its manifest, and check its floating-point weights.

    Raises:
        UsageError: nothing was exported under this prefix.
        QwenVLError: the manifest is invalid (read_manifest), a file is missing or was changed, or a weight is infinite
            or not a number (earlier versions of the plugin exported such weights).
    """
    manifest = read_manifest(prefix)
    for name, expected in {params_path(prefix).name: manifest.weights, **manifest.programs}.items():
        path = prefix.with_name(name)
        if not path.is_file():
            raise QwenVLError(f"{path}: missing; export again")
        if FileDigest.of(path, f"verifying {name}") != expected:
            raise QwenVLError(f"{path}: not what {manifest_path(prefix).name} describes; export again")
    _check_numbers(params_path(prefix), manifest)
    return manifest


def _check_numbers(path: Path, manifest: Manifest) -> None:
    """Check the weights in floating-point storage; quantized ones were checked when they were packed."""
    entries = [entry for entry in read_tensors(path, manifest) if entry.dtype in STORAGE]
    for entry in track(entries, f"checking the values in {path.name}", len(entries)):
        storage = STORAGE[entry.dtype]
        n_values = entry.n_bytes // storage.itemsize
        values = np.memmap(path, storage, "r", entry.offset, n_values)
        starts = range(0, n_values, _CHUNK_VALUES)
        n_bad = sum(n_not_finite(values[i : i + _CHUNK_VALUES], entry.dtype) for i in starts)
        if n_bad:
            raise QwenVLError(
                f"{path}: {entry.name}: {n_bad} of its values are infinite or not a number; fix the weights of the "
                "model, and export again"
            )
