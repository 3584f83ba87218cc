"""The `qwenvl` command: subcommands, and the conversion of errors to one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NoReturn

import typer

from paddlemix_qwenvl_plugin.cli import (
    batch,
    build_engine,
    chat,
    convert,
    demo,
    doctor,
    eval,
    export,
    make_tiny,
    patches,
    predict,
    quantize,
    recipes,
    run,
    serve,
    signals,
    verify,
)
from paddlemix_qwenvl_plugin.cli.options import (
    GenerationCommand,
    open_model,
    open_model_or_server,
    with_flags,
)
from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.debug import print_traceback_if_debugging
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, first_line, line_of, one_line
from paddlemix_qwenvl_plugin.util.memory import require_addresses
from paddlemix_qwenvl_plugin.util.program import program
from paddlemix_qwenvl_plugin.version import __version__

# typer depends on click, but from 0.26 on contains a copy of it. The ClickException of either is found through typer's
# BadParameter, which is derived from UsageError, which is derived from ClickException.
_ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="qwenvl",
    help="Export and run Qwen-VL with Paddle.",
    pretty_exceptions_enable=False,
    # Flags are spelled as upstream's, --max_new_tokens; --max-new-tokens is an alias.
    context_settings={
        "token_normalize_func": lambda name: name.replace("-", "_"),
        "help_option_names": ["-h", "--help"],
    },
)


def _version(requested: bool) -> None:
    if requested:
        print(f"qwenvl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    if debug:
        os.environ[env.DEBUG.name] = "1"


app.command("demo")(demo.demo)
app.command("predict", cls=GenerationCommand)(with_flags(predict.predict, open_model=open_model))
app.command("batch", cls=GenerationCommand)(with_flags(batch.batch, open_model=open_model_or_server))
app.command("chat", cls=GenerationCommand)(with_flags(chat.chat, open_model=open_model_or_server))
app.command("serve", cls=serve.ServeCommand)(with_flags(serve.serve))
app.command("export-vision")(with_flags(export.export_vision))
app.command("export-language")(with_flags(export.export_language))
app.command("verify")(verify.verify)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("make-tiny")(make_tiny.make_tiny)
app.command("build-engine")(with_flags(build_engine.build_engine))
app.command("build-ops", hidden=True)(build_engine.build_engine)  # earlier name of build-engine
app.command("run")(run.run)
app.command("doctor")(doctor.doctor)
app.add_typer(eval.app, name="eval")
app.add_typer(recipes.app, name="recipes")
app.add_typer(patches.app, name="patches")


def main() -> None:
    """Run the command line.

    An error prints one line on stderr and exits with code 1 (failure), 2 (usage), 130 (interrupted), 143 (SIGTERM) or
    129 (SIGHUP). If the reader of the output has exited, the code is 1, without a line.
    """
    _prepare_streams()
    try:
        require_addresses("qwenvl", mib=200)  # under a lower `ulimit -v`, libraries would hang or abort
        with signals.ending():
            code = app(prog_name="qwenvl", standalone_mode=False) or 0
        if code == 130:  # some versions of typer turn KeyboardInterrupt into this code, others let it through
            raise KeyboardInterrupt
        sys.stdout.flush()  # a full disk shows here, while it can still be reported
    except QwenVLError as error:
        _fail(line_of(error), error.exit_code)
    except _ClickException as error:
        subcommands = error.ctx.command_path.split()[1:] if error.ctx else []
        command = " ".join([program(), *subcommands])
        _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except signals.Terminated as error:
        _fail("terminated", int(error.code or 0))
    except BrokenPipeError:
        # The reader of the output has exited, as in `qwenvl recipes list | head -1`: print no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (OSError, MemoryError) as error:
        _fail(line_of(error), 1)
    except Exception as error:  # a defect of this package or of a library
        name, text = type(error).__name__, first_line(error)
        cause = name if text == name else f"{name}: {text[:200]}"
        _fail(f"internal error: {cause} (run with --debug for the traceback)", 1)
    sys.exit(code)


def _prepare_streams() -> None:
    """Replace closed standard streams by /dev/null, and make stdout escape characters that it cannot encode.

    Opened in this order, the replacements take file descriptors 0 to 2: otherwise another file could get one of them,
    and C++ code would write its output into that file. sys.stdin stays None if closed: its reader reports the error.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> NoReturn:
    print_traceback_if_debugging()
    print(f"qwenvl: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
