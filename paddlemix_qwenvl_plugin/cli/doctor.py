"""`qwenvl doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.doctor import Report

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    model: Optional[Path] = typer.Option(None, "--model_name_or_path", help="Also check this model folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Check Paddle, the GPUs, the engine, the upstreams, the hooks and a model folder, and suggest fixes."""
    from paddlemix_qwenvl_plugin.doctor import examine
    from paddlemix_qwenvl_plugin.util.machine import gpus

    report = examine(model, gpus())
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        _print(report)
    problems = report.count("problem")
    if problems:
        raise QwenVLError(f"doctor: {problems} problem{'s' if problems > 1 else ''} found")


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)  # lines are not broken, so that they can be copied
    for check in report.checks:
        console.print(Text.assemble((f"{check.status:<8}", _COLOURS[check.status]), check.message))
        if check.fix is not None:
            console.print(Text(" " * 8 + check.fix))
