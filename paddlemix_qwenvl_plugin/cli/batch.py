"""`qwenvl batch`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import check_target

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL


def batch(
    context: typer.Context,
    open_pair: Callable[[], QwenVL],
    source: Path = typer.Argument(..., metavar="IN.jsonl", help="A request on each line."),
    target: Path = typer.Argument(..., metavar="OUT.jsonl", help="Where the results go, in the same order."),
    batch_size: int = typer.Option(8, "--batch_size", min=1, help="Rows that are run together."),
) -> None:
    """Answer every row of a file; run it again to continue after an interruption.

    The generation options hold for rows that have none of their own.
    """
    from paddlemix_qwenvl_plugin.batch.job import count_failed, partial_path, run
    from paddlemix_qwenvl_plugin.batch.source import Source

    options: GenerationOptions = context.obj
    check_target(target)
    rows = Source(source, options)
    there = target.exists()
    if there and target.samefile(source):
        raise UsageError(f"{target}: is the input; name another output")
    if not there:
        run(rows, target, open_pair(), batch_size)
    failed, n_rows = count_failed(target, rows), len(rows.entries)
    partial_path(target).unlink(missing_ok=True)  # of a process that was killed at its very end
    print(f"{target}: has all {n_rows} rows already" if there else f"{target}: wrote {n_rows} rows")
    if failed:
        raise QwenVLError(f"{failed} of {n_rows} rows failed; their lines in {target} say why")
