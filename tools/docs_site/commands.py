"""Markdown of the documentation page about the `qwenvl` commands, generated from the command line interface."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

SERVE_FLAGS = "The other flags are the [server settings](serve.md)."


def reference() -> str:
    """Return the Markdown: for each command a section with its description, usage, arguments and flags."""
    import typer

    from paddlemix_qwenvl_plugin.cli.main import app

    return "\n".join(_sections(typer.main.get_command(app), "qwenvl", None))


def _sections(command: Any, path: str, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=path.split()[-1], parent=parent)
    children = getattr(command, "commands", None)
    # A group of commands has no section, except for `qwenvl` itself.
    if children is None or parent is None:
        yield from _section(command, path, context)
    for name, child in (children or {}).items():
        if not child.hidden:
            yield from _sections(child, f"{path} {name}", context)


def _section(command: Any, path: str, context: Any) -> Iterator[str]:
    # Listing all flags of `qwenvl serve` needs the server's libraries; these flags have a separate page.
    is_serve = path == "qwenvl serve"
    parameters = command.params if is_serve else command.get_params(context)
    usage = ["[OPTIONS]"] if is_serve else command.collect_usage_pieces(context)
    yield f"## `{path}`\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    if path != "qwenvl":
        yield f"```text\n{' '.join([path, *usage])}\n```\n"
    rows = [row for parameter in parameters for row in _row(parameter)]
    if rows:
        yield "\n".join(["| | | default |", "| --- | --- | --- |", *rows]) + "\n"
    if is_serve:
        yield f"{SERVE_FLAGS}\n"


def _row(parameter: Any) -> Iterator[str]:
    """Yield the table row of an argument or option, if it is documented."""
    text = getattr(parameter, "help", None)
    if getattr(parameter, "hidden", False) or not text or "--help" in parameter.opts:
        return
    if parameter.param_type_name == "argument":
        names = f"`{(parameter.metavar or parameter.name.upper()).strip('[]{}')}`"
    else:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    default = "required" if parameter.required else _default(parameter.default)
    yield f"| {names} | {text.replace('|', '&#124;')} | {default} |"


def _default(value: Any) -> str:
    has_default = not (value is None or value is False or value == "" or callable(value))
    return f"`{value}`" if has_default else ""
