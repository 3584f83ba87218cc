"""`qwenvl batch`."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import check_target

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.model import Model
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions


def batch(
    context: typer.Context,
    open_model: Callable[[], Model[Any]],
    source: Path = typer.Argument(
        ..., metavar="IN.jsonl", help="One request per line; - reads standard input."
    ),
    target: Path = typer.Argument(
        ...,
        metavar="OUT.jsonl",
        help="Results in the order of the input; - writes standard output.",
    ),
    batch_size: int = typer.Option(8, "--batch_size", min=1, help="Number of concurrent rows."),
) -> None:
    """Answer every row of a file; run the command again to resume after an interruption.

    The generation options are defaults for rows that do not set them.
    """
    from paddlemix_qwenvl_plugin.batch.job import count_failed, partial_path, run
    from paddlemix_qwenvl_plugin.batch.source import STANDARD, Source

    options: GenerationOptions = context.obj
    with contextlib.ExitStack() as stack:
        name, to_stdout = str(target), target == STANDARD
        if to_stdout:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qwenvl-batch-"))
            name, target = "standard output", Path(folder) / "out.jsonl"
        check_target(target)
        rows = Source(source, options)
        exists = target.exists()
        if exists and source != STANDARD and target.samefile(source):
            raise UsageError(f"{name}: is the input; name another output")
        if not exists:
            run(rows, target, open_model(), batch_size)
        failed, n_rows = count_failed(target, rows), len(rows.entries)
        partial_path(target).unlink(missing_ok=True)  # left by a process killed after writing the output
        if to_stdout:
            with target.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
        else:
            print(f"{name}: has all {n_rows} rows already" if exists else f"{name}: wrote {n_rows} rows")
    if failed:
        raise QwenVLError(f"{failed} of {n_rows} rows failed; see their errors in {name}")
