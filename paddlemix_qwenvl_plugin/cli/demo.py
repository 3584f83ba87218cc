"""`qwenvl demo`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import typer

from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.program import program


def demo(
    out: Path = typer.Argument(Path("qwenvl-demo"), metavar="[OUT_DIR]", help="Folder to write to."),
) -> None:
    """Export the bundled demo model, ask it the bundled questions about images, and show the answers.

    The command asks no other questions; for your own images, use `qwenvl predict` and `qwenvl chat` with the real
    model.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a pipe gets each line at once, too
    print("A small demo model, trained on drawn images of shapes and words, answers eight questions.")
    from paddlemix_qwenvl_plugin.demo.run import PAGE, SHEET, run_demo

    run = run_demo(out, print)
    print()
    print(f"{run.right} of {len(run.results)} answers are right.")
    print(f"Page:   {out / PAGE}")
    print(f"Sheet:  {out / SHEET}")
    wrong = len(run.results) - run.right
    if wrong:
        raise QwenVLError(
            f"{wrong} of the demo's {len(run.results)} answers are wrong; all are right in the project's tests: "
            f"this installation computes wrong results; see {out / PAGE}"
        )
    name = program()
    print(
        f"Your own images need the real model and `{name} predict` or `{name} chat`; the page explains how."
    )
