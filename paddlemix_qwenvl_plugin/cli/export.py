"""`qwenvl export-vision` and `qwenvl export-language`, with the upstream scripts' flag names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

import typer

from paddlemix_qwenvl_plugin.cli import options as flags
from paddlemix_qwenvl_plugin.util.errors import UsageError

_MODEL = typer.Option(..., "--model_name_or_path", help="Model folder.")
_ENGINE = typer.Option(
    None,
    "--engine",
    help="auto: add programs of the engine if it can be built; fused: fail if it cannot; "
    "portable: portable graph only. Default: QWENVL_ENGINE, else auto.",
)
_DTYPE = typer.Option("float32", "--dtype", help="float32, float16 or bfloat16.")
_LORA = typer.Option(
    [],
    "--lora",
    metavar="PATH[=WEIGHT]",
    help="LoRA adapter of PEFT or PaddleNLP to merge into the weights; repeatable. WEIGHT: a factor, default 1.",
)


def export_vision(
    model: Path = _MODEL,
    save_path: Path = typer.Option(..., "--save_path", help="Prefix of the files to write."),
    dtype: str = _DTYPE,
    engine: Optional[str] = _ENGINE,
    lora: list[str] = _LORA,
) -> None:
    """Export the vision stage: images to features."""
    from paddlemix_qwenvl_plugin.export.export import export_vision as export

    manifest = export(model, save_path, dtype, engine, [_adapter(text) for text in lora])
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
    lora: list[str] = _LORA,
) -> None:
    """Export the language stage: tokens and features to tokens."""
    from paddlemix_qwenvl_plugin.export.export import export_language as export

    manifest = export(
        model, output_path, model_prefix, dtype, engine, quant_type, [_adapter(text) for text in lora]
    )
    print(
        f"exported the language stage to {output_path / model_prefix} "
        f"({manifest.dtype}, {manifest.weights.bytes / 1e6:.1f} MB)"
    )


def _adapter(text: str) -> tuple[str, float]:
    """Parse PATH or PATH=WEIGHT. Text after the last = is the weight if it is a number.

    Raises:
        UsageError: PATH does not exist, but a file or folder with the name PATH=WEIGHT does.
    """
    path, _, weight = text.rpartition("=")
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", weight, re.IGNORECASE):
        return text, 1.0
    if not Path(path).exists() and Path(text).exists():
        raise UsageError(
            f"--lora {text}: no such adapter folder {path}; for the folder {text} write {text}=1"
        )
    return path, float(weight)
