"""`qwenvl verify`."""

from __future__ import annotations

from pathlib import Path

import typer


def verify(
    prefix: Path = typer.Argument(..., help="Prefix of an exported stage, without the file suffixes."),
) -> None:
    """Compare every file of an exported stage with its manifest, and check that all weights are finite."""
    from paddlemix_qwenvl_plugin.artifact.verify import verify as verify_stage

    manifest = verify_stage(prefix)
    print(
        f"{prefix}: the {manifest.stage} stage is as it was exported ({manifest.weights.bytes / 1e6:.1f} MB)"
    )
