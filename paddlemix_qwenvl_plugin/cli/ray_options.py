"""The flag `--ray [ADDRESS]`, whose address may be omitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
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
    result = []
    for arg, next_arg in zip_longest(args, args[1:], fillvalue=""):
        has_address = _ADDRESS.fullmatch(next_arg) is not None
        result.append("--ray=" if arg == "--ray" and not has_address else arg)
    return result
