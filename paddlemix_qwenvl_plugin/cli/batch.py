"""`qwenvl batch`."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import typer

from paddlemix_qwenvl_plugin.cli.ray_options import RayAddress
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.files import check_target

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.model import Model
    from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions


# main.py replaces the parameter open_model by flags; context.obj has the GenerationOptions (options.py).
def batch(
    context: typer.Context,
    open_model: Callable[[], Model[Any]],
    in_name: str = typer.Argument(
        ..., metavar="IN.jsonl", help="One request per line; - reads standard input."
    ),
    out_name: str = typer.Argument(
        ...,
        metavar="OUT.jsonl",
        help="Results in the order of the input; - writes standard output.",
    ),
    batch_size: int = typer.Option(8, "--batch_size", min=1, help="Number of concurrent rows."),
    ray: RayAddress = None,
    ray_actors: Optional[str] = typer.Option(
        None,
        "--ray_actors",
        metavar="MIN:MAX",
        help="Number of actors, each with its own model; default: 1 to as many as there is room for.",
        rich_help_panel="Ray",
    ),
    ray_cpus: Optional[float] = typer.Option(
        None, "--ray_cpus", help="CPUs of an actor, or a share of one; default: 1.", rich_help_panel="Ray"
    ),
    ray_gpus: Optional[float] = typer.Option(
        None,
        "--ray_gpus",
        help="GPUs of an actor, or a share of one; default: 1 with --device gpu, else 0.",
        rich_help_panel="Ray",
    ),
    prompt: Optional[str] = typer.Option(
        None,
        "--prompt",
        help="Prompt of the rows of Parquet files, WebDataset files and folders of images that have none.",
        rich_help_panel="Ray",
    ),
) -> None:
    """Answer every row of a file; run the command again to resume after an interruption.

    The generation options are defaults for rows that do not set them. With --ray, IN may also be a Parquet file, a
    WebDataset (.tar), a folder of these or of images, or a URL of one, and OUT is a folder.
    """
    if ray is not None:
        from paddlemix_qwenvl_plugin.cli.batch_on_ray import batch_on_ray

        ray_options = ray_actors, ray_cpus, ray_gpus
        batch_on_ray(context.obj, open_model, in_name, out_name, batch_size, prompt, ray, *ray_options)
        return
    for flag, value in (
        ("ray_actors", ray_actors),
        ("ray_cpus", ray_cpus),
        ("ray_gpus", ray_gpus),
        ("prompt", prompt),
    ):
        if value is not None:
            raise UsageError(f"--{flag}: requires --ray; give both")
    from paddlemix_qwenvl_plugin.batch.job import count_failed, partial_path, run
    from paddlemix_qwenvl_plugin.batch.source import STANDARD, Source

    options: GenerationOptions = context.obj
    source, target = Path(in_name), Path(out_name)
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
