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
    """Give a `--ray` without an address the empty one, which typer cannot do.

    What follows `--ray` is its address only if it looks like one: in `--ray in.jsonl out` it is not.
    """
    args = list(args)
    return [
        "--ray="
        if arg == "--ray" and not (args[index + 1 :] and _ADDRESS.fullmatch(args[index + 1]))
        else arg
        for index, arg in enumerate(args)
    ]
