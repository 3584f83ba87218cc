"""The manifest beside each exported stage, `PREFIX.manifest.json`: what it is and from what it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Optional

from pydantic import BaseModel, ConfigDict, ValidationError

from paddlemix_qwenvl_plugin.artifact.contract import CONTRACT_VERSION
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, first_problem
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


class FileDigest(BaseModel):
    """Size and SHA-256 of a file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 22), b""):
                digest.update(block)
                size += len(block)
        return cls(bytes=size, sha256=digest.hexdigest())


class Manifest(BaseModel):
    """One exported stage. `model` is the checkpoint's fingerprint, which both stages of a pair share.

    `quant_type` tells how matrices are stored that are not stored as `dtype`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contract: int
    stage: str
    plugin: str
    paddle: str
    dtype: str
    quant_type: Optional[str] = None
    model: str
    config: ModelConfig
    weights: FileDigest
    programs: dict[str, FileDigest]


def manifest_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".manifest.json")


def read_manifest(prefix: Path, stage: str) -> Manifest:
    """Read and check the manifest of an exported stage, "vision" or "language".

    Raises:
        UsageError: nothing was exported under this prefix.
        QwenVLError: the manifest is damaged, of another stage or of another contract version.
    """
    path = manifest_path(prefix)
    if not path.is_file():
        command = f"qwenvl export-{stage}"
        raise UsageError(
            f"{prefix}: no exported {stage} stage there ({path.name} is missing); run {command} first"
        )
    try:
        data = json.loads(path.read_text("utf-8"))
        found = data.get("contract") if isinstance(data, dict) else None
        if isinstance(found, int) and found != CONTRACT_VERSION:
            raise QwenVLError(
                f"{path}: contract version {found}, this plugin runs version {CONTRACT_VERSION}; export again"
            )
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise QwenVLError(f"{path}: {first_problem(error)}; export again") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise QwenVLError(f"{path}: not valid JSON ({error}); export again") from error
    if manifest.stage != stage:
        raise UsageError(f"{prefix}: this is an exported {manifest.stage} stage, not the {stage} stage")
    return manifest


def check_pair(vision: Manifest, language: Manifest) -> None:
    """Refuse two stages that were not exported from the same model."""
    if vision.model != language.model:
        raise QwenVLError(
            f"the two stages come from different models (vision {vision.model[:12]}, language {language.model[:12]}); "
            "export both from the same folder"
        )
