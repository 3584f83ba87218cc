"""`qwenvl run`: run a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import typer


def run(
    recipe: str = typer.Argument(
        ..., metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file."
    ),
    overrides: Optional[list[str]] = typer.Argument(
        None,
        metavar="KEY=VALUE",
        help="Replace values, e.g. dtype=float16 steps.predict.timeout_seconds=60",
    ),
    dry_run: bool = typer.Option(False, "--dry_run", help="Print the commands and check; write nothing."),
    from_step: Optional[str] = typer.Option(
        None, "--from_step", metavar="NAME", help="Continue the newest run of this recipe at this step."
    ),
    output: Path = typer.Option(Path("runs"), "--output", metavar="DIR", help="Parent of the run folders."),
) -> None:
    """Run a recipe and record it in a dated folder."""
    from paddlemix_qwenvl_plugin.recipes import loader, runner

    loaded = loader.load(loader.find(recipe), overrides or [])
    if dry_run:
        for problem in runner.dry_run(loaded, output, from_step):
            print(f"warning: {problem}", file=sys.stderr)
    else:
        runner.run(loaded, output, from_step)
