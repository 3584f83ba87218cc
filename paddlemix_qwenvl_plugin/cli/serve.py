"""`qwenvl serve`."""

from __future__ import annotations

import functools
import inspect
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from typer.core import TyperCommand

from paddlemix_qwenvl_plugin.cli import signals
from paddlemix_qwenvl_plugin.cli.options import click_parameters
from paddlemix_qwenvl_plugin.cli.ray_options import RayAddress, with_ray_default
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_LIBRARIES = ("fastapi", "prometheus_client", "pydantic_settings", "uvicorn")


class ServeCommand(TyperCommand):
    """Command with a flag for each field of ServeSettings; its context's `obj` holds the explicitly set values.

    The flags are created on first use of the command: importing pydantic is too slow for `qwenvl --help`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments; `--ray` may omit its address."""
        return super().parse_args(ctx, with_ray_default(args))

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters, with the flags of the settings."""
        return [*super().get_params(ctx), *_setting_flags()]

    def invoke(self, ctx: Any) -> Any:
        """Store the given settings in the context and run the command."""
        from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

        ctx.obj = {}
        for name in ServeSettings.model_fields:
            value = ctx.params.pop(name)
            # A list flag may be repeated, or comma-separated like its environment variable.
            if isinstance(value, (list, tuple)):
                value = ",".join(value)
            if value not in (None, ""):
                ctx.obj[name] = value
        return super().invoke(ctx)


def serve(
    context: typer.Context,
    config: Optional[Path] = typer.Option(None, "--config", metavar="FILE", help="Settings as a YAML file."),
    print_config: bool = typer.Option(
        False, "--print_config", help="Print the settings with their origins, and exit."
    ),
    ray: RayAddress = None,
) -> None:
    """Serve an OpenAI-compatible HTTP API and a web page.

    Each setting is a flag, an environment variable, QWENVL_SERVE_ and its name in capitals, and a key of the file.
    Flags take precedence over variables, variables over the file.
    """
    from paddlemix_qwenvl_plugin.serve.settings_sources import read_settings

    settings = read_settings(context.obj, config)
    if print_config:
        print(settings.as_yaml(), end="")
        return
    if ray is None:
        from paddlemix_qwenvl_plugin.serve.start import start
    else:
        from paddlemix_qwenvl_plugin.cluster.serve.start import start_on

        start = functools.partial(start_on, ray)
    with signals.handled_by_the_command() as numbers:
        # None unless a signal interrupted the command; one that starts a graceful shutdown does not.
        interrupted_by = start(settings.values, numbers, functools.partial(print, flush=True))
    if interrupted_by == signal.SIGINT:
        raise KeyboardInterrupt
    if interrupted_by is not None:
        raise signals.Terminated(128 + interrupted_by)


@functools.cache
def _setting_flags() -> list[Any]:
    _require_libraries()
    from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

    return click_parameters([_parameter(name, field) for name, field in ServeSettings.model_fields.items()])


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Parameter from which typer creates a setting's flag. Its default is None: an unset flag overrides nothing."""
    from paddlemix_qwenvl_plugin.runtime.options import allowed
    from paddlemix_qwenvl_plugin.serve.settings_sources import literal_values

    notes = []
    kind: Any = field.annotation
    if literal_values(field):
        kind = str
        notes.append(", ".join(literal_values(field)))
    elif field.metadata and any(hasattr(limit, bound) for limit in field.metadata for bound in ("ge", "gt")):
        notes.append(allowed(field))
    if field.default not in (None, False, []):
        notes.append(f"default: {'on' if field.default is True else field.default}")
    text = (field.description or "").rstrip(".") + (f" ({'; '.join(notes)})." if notes else ".")
    opposite = name[len("no_") :] if name.startswith("no_") else f"no_{name}"
    flag_names = f"--{name}/--{opposite}" if kind is bool else f"--{name}"
    option = typer.Option(flag_names, help=text, rich_help_panel="Settings", show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Optional[kind], option]
    )


def _require_libraries() -> None:
    for library in _LIBRARIES:
        try:
            __import__(library)
        except ImportError as error:
            raise QwenVLError(
                f"qwenvl serve needs the library {error.name or library}:"
                " pip install 'paddlemix-qwenvl-plugin[serve]'"
            ) from error
