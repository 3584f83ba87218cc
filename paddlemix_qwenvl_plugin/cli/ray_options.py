"""The flag `--ray [ADDRESS]`, whose address may be omitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Optional

import typer

RayAddress = Annotated[
    Optional[str],
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Run on a Ray cluster: HOST:PORT of its head, ray://HOST:PORT, auto (that of this machine) or "
        "local (a new one); default: RAY_ADDRESS, else auto, else local.",
        rich_help_panel="Ray",
    ),
]

_ADDRESS = re.compile(r"auto|local|ray://.*|[^/\\]+:\d+")


def with_ray_default(args: Sequence[str]) -> list[str]:
    """Replace each `--ray` without an address by `--ray=`: typer does not support optional values.

    The argument after `--ray` is its address only if it has the form of one, unlike in `--ray in.jsonl out`.
    """
    args = list(args)
    return [
        "--ray="
        if arg == "--ray" and not (args[index + 1 :] and _ADDRESS.fullmatch(args[index + 1]))
        else arg
        for index, arg in enumerate(args)
    ]
