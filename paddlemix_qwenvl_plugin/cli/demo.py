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
    """Export the small demo model that is shipped, ask it about the bundled pictures, and show the answers.

    It answers the bundled questions only: `qwenvl predict` and `qwenvl chat` are for pictures of your own.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    print("A small demo model, trained on drawn pictures of shapes and words, answers eight questions.")
    from paddlemix_qwenvl_plugin.demo.run import PAGE, SHEET, run_demo

    run = run_demo(out, print)
    print()
    print(f"{run.right} of {len(run.results)} answers are right.")
    print(f"Page:   {out / PAGE}")
    print(f"Sheet:  {out / SHEET}")
    wrong = len(run.results) - run.right
    if wrong:
        raise QwenVLError(
            f"{wrong} of the demo's {len(run.results)} answers are wrong, where all are right in our tests: "
            f"this installation does not compute what it should; see {out / PAGE}"
        )
    name = program()
    print(f"Your own pictures need the real model and `{name} predict` or `{name} chat`; the page says how.")
