"""Corrupt weights in exported stages: other values, with digests in the manifest that fit them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from paddlemix_qwenvl_plugin.artifact.manifest import (
    FileDigest,
    digest_of_samples,
    manifest_path,
    params_path,
    read_manifest,
)
from paddlemix_qwenvl_plugin.artifact.params_file import read_tensors


def corrupt(prefix: Path, name: str, value: float, n: int = 1) -> None:
    """Write `value` to the first n numbers of the weight `name`, of a float type; update the manifest's digests."""
    path, manifest = params_path(prefix), read_manifest(prefix)
    entry = next(entry for entry in read_tensors(path, manifest) if entry.name == name)
    if entry.dtype == "bfloat16":
        # The upper half of a float32 is a bfloat16.
        numbers = (np.full(n, value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        numbers = np.full(n, value, entry.dtype)
    with path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(numbers.tobytes())
    data = json.loads(manifest_path(prefix).read_text())
    data.update(weights=FileDigest.of(path).model_dump(), weights_samples=digest_of_samples(path))
    manifest_path(prefix).write_text(json.dumps(data))
