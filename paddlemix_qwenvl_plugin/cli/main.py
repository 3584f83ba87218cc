"""The `qwenvl` command: one module a subcommand, one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import typer

from paddlemix_qwenvl_plugin.cli import convert, export, make_tiny, predict, recipes, run
from paddlemix_qwenvl_plugin.errors import QwenVLError

# typer carries its own copy of click from 0.16 on and needs click itself before that:
# the base class of its exceptions is the one that is raised in both.
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="qwenvl",
    help="Export and run Qwen-VL with Paddle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.")) -> None:
    if debug:
        os.environ["QWENVL_DEBUG"] = "1"


app.command("predict")(predict.predict)
app.command("export-vision")(export.export_vision)
app.command("export-language")(export.export_language)
app.command("convert")(convert.convert)
app.command("make-tiny")(make_tiny.make_tiny)
app.command("run")(run.run)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line; errors end as one line on stderr and exit code 1 (failure) or 2 (usage)."""
    # Notes for Paddle's developers, in C++ and in Python.
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except QwenVLError as error:
        if os.environ.get("QWENVL_DEBUG") == "1":
            raise
        _fail(str(error), error.exit_code)
    except _ClickException as error:
        _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"qwenvl: {message}", file=sys.stderr)
    sys.exit(code)
