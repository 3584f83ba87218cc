"""`qwenvl export-vision` and `qwenvl export-language`, with the upstream scripts' flag names."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer

from paddlemix_qwenvl_plugin.cli import options as flags

_MODEL = typer.Option(..., "--model_name_or_path", help="Model folder.")
_ENGINE = typer.Option(
    None,
    "--engine",
    help="auto: add programs of the engine if it can be built; fused: fail if it cannot; "
    "portable: portable graph only. Default: QWENVL_ENGINE, else auto.",
)
_DTYPE = typer.Option("float32", "--dtype", help="float32, float16 or bfloat16.")


def export_vision(
    model: Path = _MODEL,
    save_path: Path = typer.Option(..., "--save_path", help="Prefix of the files to write."),
    dtype: str = _DTYPE,
    engine: Optional[str] = _ENGINE,
) -> None:
    """Export the vision stage: images to features."""
    from paddlemix_qwenvl_plugin.export.export import export_vision as export

    manifest = export(model, save_path, dtype, engine)
    print(
        f"exported the vision stage to {save_path} ({manifest.dtype}, {manifest.weights.bytes / 1e6:.1f} MB)"
    )


def export_language(
    model: Path = _MODEL,
    output_path: Path = typer.Option(..., "--output_path", help="Folder to write to."),
    dtype: str = _DTYPE,
    model_prefix: str = typer.Option("model", "--model_prefix", help="Name of the files to write."),
    engine: Optional[str] = _ENGINE,
    quant_type: flags.QuantType = None,
) -> None:
    """Export the language stage: tokens and features to tokens."""
    from paddlemix_qwenvl_plugin.export.export import export_language as export

    manifest = export(model, output_path, model_prefix, dtype, engine, quant_type)
    print(
        f"exported the language stage to {output_path / model_prefix} "
        f"({manifest.dtype}, {manifest.weights.bytes / 1e6:.1f} MB)"
    )
