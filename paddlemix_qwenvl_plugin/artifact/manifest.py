"""The manifest of an exported stage, `PREFIX.manifest.json`: versions, dtypes, config and file digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from pydantic import BaseModel, ConfigDict, ValidationError

from paddlemix_qwenvl_plugin.artifact.contract import CONTRACT_VERSIONS
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, first_problem
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.program import program
from paddlemix_qwenvl_plugin.util.progress import track

_BLOCK_BYTES = 1 << 22

# When a stage is opened, a parameter file of up to 64 MiB is hashed completely, which takes about 50 ms. Of a larger
# file, 64 samples of 64 KiB are hashed (4 MiB, about 10 ms).
_MAX_FULL_BYTES = 1 << 26
_N_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class FileDigest(BaseModel):
    """Size and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, label: Optional[str] = None) -> FileDigest:
        """Compute the digest of a file; with a label, report progress under it."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            blocks: Iterable[bytes] = iter(lambda: file.read(_BLOCK_BYTES), b"")
            if label is not None:
                blocks = track(blocks, label, -(-path.stat().st_size // _BLOCK_BYTES))
            for block in blocks:
                digest.update(block)
                size += len(block)
        return cls(bytes=size, sha256=digest.hexdigest())


def digest_of_samples(path: Path) -> str:
    """SHA-256 of samples spread evenly over a file, the first and last bytes included."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_N_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class MergedAdapter(BaseModel):
    """A LoRA adapter merged into the weights: name of its folder, factor (`weight`), and `Adapter.fingerprint`."""

    model_config = ConfigDict(frozen=True)

    name: str
    weight: float
    fingerprint: str


class Manifest(BaseModel):
    """The manifest of an exported stage.

    `contract`, `plugin` and `paddle` are the versions that wrote the export. `model` is the checkpoint's fingerprint,
    the same in both stages of a model. `quant_type` is the quantization of the matrices that are not stored as `dtype`.
    `lora`: the adapters merged at export. `weights` is the digest of the parameter file, and `weights_samples` its
    `digest_of_samples`, which exports of contract version 2 lack. `programs`: file name -> digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contract: int
    stage: str
    plugin: str
    paddle: str
    dtype: str
    quant_type: Optional[str] = None
    lora: list[MergedAdapter] = []
    model: str
    config: ModelConfig
    weights: FileDigest
    weights_samples: Optional[str] = None
    programs: dict[str, FileDigest]


def manifest_path(prefix: Path) -> Path:
    """Path of a stage's manifest."""
    return prefix.with_name(prefix.name + ".manifest.json")


def params_path(prefix: Path) -> Path:
    """Path of a stage's parameter file."""
    return prefix.with_name(prefix.name + ".pdiparams")


def read_manifest(prefix: Path, stage: Optional[str] = None) -> Manifest:
    """Read and validate the manifest of an exported stage.

    Args:
        stage: the expected stage, "vision" or "language"; None accepts either.

    Raises:
        UsageError: nothing was exported under this prefix, or another stage.
        QwenVLError: the manifest is damaged, or has an unsupported contract version.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        if stage:
            missing, command = f"{stage} stage", f"{program()} export-{stage}"
        else:
            missing, command = "stage", "an export"
        raise UsageError(
            f"{prefix}: no exported {missing} there ({path.name} is missing); run {command} first"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
        contract = data.get("contract") if isinstance(data, dict) else None
        if isinstance(contract, int) and contract not in CONTRACT_VERSIONS:
            versions = " and ".join(map(str, CONTRACT_VERSIONS))
            raise QwenVLError(
                f"{path}: contract version {contract}, this plugin runs versions {versions}; export again"
            )
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise QwenVLError(f"{path}: {first_problem(error)}; export again") from error
    except (ValueError, RecursionError) as error:  # includes invalid UTF-8 and excessive nesting
        raise QwenVLError(f"{path}: not valid JSON ({error}); export again") from error
    if stage is not None and manifest.stage != stage:
        raise UsageError(f"{prefix}: this is an exported {manifest.stage} stage, not the {stage} stage")
    return manifest


def check_weights(path: Path, manifest: Manifest) -> None:
    """Check that a parameter file is the exported file.

    A file of up to 64 MiB is hashed completely. Of a larger one, only the size and samples are checked; only the size
    if the manifest is of contract version 2, which has no digest of samples.

    Raises:
        QwenVLError: the file is missing, or its size or content differs from the manifest.
    """
    if not path.is_file():
        raise QwenVLError(f"{path}: missing; export again")
    size, expected = path.stat().st_size, manifest.weights.bytes
    if size != expected:
        raise QwenVLError(f"{path}: {size} bytes where {expected} were exported; export again")
    if expected <= _MAX_FULL_BYTES:
        same = FileDigest.of(path) == manifest.weights
    else:
        same = manifest.weights_samples in (None, digest_of_samples(path))
    if not same:
        raise QwenVLError(f"{path}: not the weights that were exported; export again")


def check_pair(vision: Manifest, language: Manifest) -> None:
    """Check that both stages were exported from the same model; raise QwenVLError otherwise."""
    if vision.model != language.model:
        raise QwenVLError(
            f"the two stages come from different models (vision {vision.model[:12]}, language {language.model[:12]}); "
            "export both from the same folder, with the same --lora"
        )
