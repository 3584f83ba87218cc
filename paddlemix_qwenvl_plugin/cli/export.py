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
    help="auto (programs of the engine beside the portable ones, where it can be built), fused (or an error), "
    "portable (without); default: QWENVL_ENGINE, else auto.",
)
_DTYPE = typer.Option("float32", "--dtype", help="float32, float16 or bfloat16.")


def export_vision(
    model: Path = _MODEL,
    save_path: Path = typer.Option(..., "--save_path", help="Prefix of the files to write."),
    dtype: str = _DTYPE,
    engine: Optional[str] = _ENGINE,
) -> None:
    """Export stage 1: images to features."""
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
    """Export stage 2: tokens and features to tokens."""
    from paddlemix_qwenvl_plugin.export.export import export_language as export

    manifest = export(model, output_path, model_prefix, dtype, engine, quant_type)
    print(
        f"exported the language stage to {output_path / model_prefix} "
        f"({manifest.dtype}, {manifest.weights.bytes / 1e6:.1f} MB)"
    )
