"""Load recipes: find, read, apply `key=value` overrides, validate with one-line errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paddlemix_qwenvl_plugin.recipes import interpolate
from paddlemix_qwenvl_plugin.recipes.schema import Recipe
from paddlemix_qwenvl_plugin.util import plain_yaml
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.shipped import PACKAGE, shipped_folder


def shipped_dir(package: Path = PACKAGE) -> Path:
    """Folder of the shipped recipes, in an installed wheel or in a source tree."""
    return shipped_folder("recipes", "recipes/shipped", package)


def shipped() -> dict[str, Path]:
    """Shipped recipes, name -> file, sorted by name."""
    return {path.stem: path for path in sorted(shipped_dir().glob("*.yaml"))}


def find(recipe: str) -> Path:
    """Find a recipe's file by path (ends in .yaml or .yml, or has a folder) or by shipped name.

    Raises:
        UsageError: no such file or shipped recipe.
    """
    path = _expanded(recipe)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise UsageError(f"{recipe}: no such recipe file")
        return path
    try:
        return shipped()[recipe]
    except KeyError:
        raise UsageError(
            f"no recipe named {recipe!r}; shipped: {', '.join(shipped())}; or give the path of a .yaml file"
        ) from None


def load(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply the overrides (`key=value`) and resolve its paths.

    In the result `${recipe_dir}` is filled in and asset paths are absolute (relative ones are resolved against the
    current directory), so its YAML gives the same run from any folder, except for relative paths in steps and
    expectations.

    Raises:
        UsageError: the file cannot be read or is not plain YAML, an override is not `key=value` or names no part of the
            recipe, or the recipe or an overridden value violates the schema.
    """
    data = plain_yaml.read_file(path, "a recipe")
    recipe = _validate(data, str(path))
    if overrides:
        for override in overrides:
            _apply(data, override)
        # The file alone is valid, so an override causes any error from here on.
        recipe = _validate(data, "override")
    _resolve_paths(recipe, path.resolve().parent)
    return recipe


def _validate(data: Any, source: str) -> Recipe:
    if not isinstance(data, dict):
        raise UsageError(f"{source}: a recipe is a mapping of keys to values")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UsageError(f"{source}: {_describe_error(errors[0], data)}{more}") from error


def _describe_error(error: Any, data: Any) -> str:
    location = list(error["loc"])
    if error["type"] == "unknown_key":
        location.append(error["ctx"]["key"])
    message = str(error["msg"])
    if error["type"] == "missing":
        message = "this key is required"
    elif error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    elif error["type"] != "unknown_key":
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r:.60}"
    key = _dotted(location, data)
    return f"{key}: {message}" if key else message


def _dotted(location: list[Any], data: Any) -> str:
    """Format a key path as in overrides; list items are denoted by their name, if any."""
    parts = []
    for part in location:
        if part == "[key]":  # pydantic's marker after a key that is itself invalid
            continue
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
        has_name = isinstance(part, int) and isinstance(data, dict) and isinstance(data.get("name"), str)
        parts.append(data["name"] if has_name else str(part))
    return ".".join(parts)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r}: write key=value")
    try:
        value = plain_yaml.read(text)
    except plain_yaml.NotPlain as error:
        raise UsageError(
            f"override {override!r:.200}: the value is not plain YAML ({error}); quote it"
        ) from error
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        position = _position(node, part, override, ".".join(parents[:depth]))
        if isinstance(node, dict) and node.get(position) is None:
            node[position] = {}
        node = node[position]
    # The schema validates the last key.
    node[_position(node, last, override, ".".join(parents))] = value


def _position(node: Any, part: str, override: str, where: str) -> str | int:
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise UsageError(f"override {override!r}: {where} has no keys")
    names = [item.get("name", str(i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    if part in names:
        return names.index(part)
    raise UsageError(f"override {override!r}: {where} has no {part!r}; known: {', '.join(names) or 'none'}")


def _resolve_paths(recipe: Recipe, folder: Path) -> None:
    values = {"recipe_dir": str(folder)}
    for asset in recipe.assets:
        asset.path = str(Path.cwd() / _expanded(interpolate.fill(asset.path, values)))
    for step in recipe.steps:
        step.run = [interpolate.fill(argument, values) for argument in step.run]
    for expect in recipe.expect:
        expect.file = interpolate.fill(expect.file, values)
    for key, value in recipe.env.items():
        recipe.env[key] = interpolate.fill(value, values)


def _expanded(path: str) -> Path:
    """Expand `~` in a path. Path.expanduser() would raise for an unknown user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111
