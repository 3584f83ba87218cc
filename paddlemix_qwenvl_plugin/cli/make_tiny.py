"""`qwenvl make-tiny`."""

from __future__ import annotations

from pathlib import Path

import typer


def make_tiny(
    folder: Path = typer.Argument(..., metavar="DIR", help="New folder."),
    seed: int = typer.Option(0, min=0, help="Seed of the random weights."),
) -> None:
    """Make a tiny random model with a tokenizer, for trials and tests."""
    from paddlemix_qwenvl_plugin.tiny.make import make_tiny as write

    write(folder, seed)
    print(f"made {folder}")
