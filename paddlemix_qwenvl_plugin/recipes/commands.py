"""Commands of a recipe's steps, with the references `${name}` filled in, for a process or a shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from paddlemix_qwenvl_plugin.recipes import interpolate
from paddlemix_qwenvl_plugin.recipes.schema import Recipe, Step


def values(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Map the references of a recipe to their values, for a run in `folder`.

    A seed or dtype that is not set becomes "None"; no recipe refers to it (schema.py).
    """
    return {
        "seed": str(recipe.seed),
        "dtype": str(recipe.dtype),
        "run_dir": str(folder),
        "python": sys.executable,
        **{f"assets.{asset.name}": asset.path for asset in recipe.assets},
    }


def env(recipe: Recipe, references: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of the recipe."""
    return {key: interpolate.fill(value, references) for key, value in recipe.env.items()}


def argv(step: Step, references: Mapping[str, str]) -> list[str]:
    """Command line of a step, as arguments of a process."""
    arguments = [interpolate.fill(argument, references) for argument in step.run]
    # `qwenvl` is the command of this installation, not one on PATH.
    qwenvl = [sys.executable, "-m", "paddlemix_qwenvl_plugin.cli"]
    return [*qwenvl, *arguments[1:]] if arguments[0] == "qwenvl" else arguments


def shell_lines(recipe: Recipe, folder: Path, first: int = 0) -> list[str]:
    """Shell lines that set the environment and run each step from index `first` on, once."""
    references = values(recipe, folder)
    lines = [f"export {key}={shlex.quote(value)}" for key, value in env(recipe, references).items()]
    for step in recipe.steps[first:]:
        lines += [f"# {step.name}", shlex.join(argv(step, references))]
    return lines
