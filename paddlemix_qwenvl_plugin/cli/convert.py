"""`qwenvl convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import typer


def convert(
    source: Path = typer.Argument(..., metavar="SRC", help="Model folder in any supported format."),
    target: Path = typer.Argument(..., metavar="DST", help="New folder."),
    dtype: Optional[str] = typer.Option(None, help="float32, float16 or bfloat16; default: that of SRC."),
    to: str = typer.Option("paddlemix", help="Naming scheme and layout: huggingface, paddlemix or static."),
) -> None:
    """Rewrite a model folder as sharded safetensors."""
    from paddlemix_qwenvl_plugin.checkpoint.convert import convert as rewrite
    from paddlemix_qwenvl_plugin.checkpoint.dtypes import check_dtype

    rewrite(source, target, check_dtype(dtype) if dtype else None, to)
    print(f"wrote {target}")
