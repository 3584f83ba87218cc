"""A recipe's steps as commands: references filled in, ready for a process or for a shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from paddlemix_qwenvl_plugin.recipes import interpolate
from paddlemix_qwenvl_plugin.recipes.schema import Recipe, Step


def values(recipe: Recipe, folder: Path) -> dict[str, str]:
    """What each reference stands for in a run whose folder is `folder`."""
    return {
        "seed": str(recipe.seed),
        "dtype": str(recipe.dtype),
        "run_dir": str(folder),
        "python": sys.executable,
        **{f"assets.{asset.name}": asset.path for asset in recipe.assets},
    }


def env(recipe: Recipe, filled: Mapping[str, str]) -> dict[str, str]:
    """The recipe's own environment variables."""
    return {key: interpolate.fill(value, filled) for key, value in recipe.env.items()}


def argv(step: Step, filled: Mapping[str, str]) -> list[str]:
    """The step's arguments as a process gets them."""
    arguments = [interpolate.fill(argument, filled) for argument in step.run]
    # This installation's command, also where another one, or none, is on PATH.
    own = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"]
    return [*own, *arguments[1:]] if arguments[0] == "qwenvl" else arguments


def shell_lines(recipe: Recipe, folder: Path, first: int = 0) -> list[str]:
    """The run as lines for a shell."""
    filled = values(recipe, folder)
    lines = [f"export {key}={shlex.quote(value)}" for key, value in env(recipe, filled).items()]
    for step in recipe.steps[first:]:
        lines += [f"# {step.name}", shlex.join(argv(step, filled))]
    return lines
