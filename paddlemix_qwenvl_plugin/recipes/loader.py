"""Find a recipe, read it, apply `key=value` overrides, and say in one line what is wrong with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from paddlemix_qwenvl_plugin.recipes import interpolate
from paddlemix_qwenvl_plugin.recipes.schema import Recipe
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.shipped import PACKAGE, shipped_folder


def shipped_dir(package: Path = PACKAGE) -> Path:
    """The folder of the recipes that come with the package; see paddlemix_qwenvl_plugin/util/shipped.py."""
    return shipped_folder("recipes", "recipes/shipped", package)


def shipped() -> dict[str, Path]:
    """Name -> file of each shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(shipped_dir().glob("*.yaml"))}


def find(recipe: str) -> Path:
    """The file of a recipe given as a path (it ends in .yaml or .yml, or has a folder) or as a shipped name.

    Raises:
        UsageError: there is no such file or shipped recipe.
    """
    path = Path(recipe).expanduser()
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
    """Read a recipe, apply the overrides (`key=value`) and fix its paths.

    In the result `${recipe_dir}` is filled in and asset paths are absolute (relative ones start at the
    current directory), so its YAML gives the same run from any folder.

    Raises:
        UsageError: the file cannot be read, is not YAML, or breaks the schema; an override does.
    """
    data = _read_yaml(path)
    recipe = _validate(data, str(path))
    if overrides:
        data = copy.deepcopy(data)
        for override in overrides:
            _apply(data, override)
        # The file alone was valid, so whatever is wrong now came from the command line.
        recipe = _validate(data, "override")
    _fix_paths(recipe, path.resolve().parent)
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error instead of a silent last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(f"{path}{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from error


def _validate(data: Any, source: str) -> Recipe:
    if not isinstance(data, dict):
        raise UsageError(f"{source}: a recipe is a mapping of keys to values")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UsageError(f"{source}: {_line(errors[0], data)}{more}") from error


def _line(error: Any, data: Any) -> str:
    location = list(error["loc"])
    if error["type"] == "unknown_key":
        location.append(error["ctx"]["key"])
    message = str(error["msg"])
    if error["type"] == "missing":
        message = "this key is required"
    elif error["type"] == "value_error":
        message = str(error["ctx"]["error"])
    elif error["type"] != "unknown_key":
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    key = _dotted(location, data)
    return f"{key}: {message}" if key else message


def _dotted(location: list[Any], data: Any) -> str:
    """A key path as overrides write it: items of lists go by their name where they have one."""
    parts = []
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            data = None
        named = isinstance(part, int) and isinstance(data, dict) and isinstance(data.get("name"), str)
        parts.append(data["name"] if named else str(part))
    return ".".join(parts)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override {override!r}: write key=value")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"override {override!r}: the value is not YAML; quote it") from error
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents):
        position = _position(node, part, override, ".".join(parents[:depth]))
        if isinstance(node, dict) and node.get(position) is None:
            node[position] = {}
        node = node[position]
    # Whether the last key is a known one is for the schema to say.
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


def _fix_paths(recipe: Recipe, folder: Path) -> None:
    values = {"recipe_dir": str(folder)}
    for asset in recipe.assets:
        asset.path = str(Path.cwd() / Path(interpolate.fill(asset.path, values)).expanduser())
    for step in recipe.steps:
        step.run = [interpolate.fill(argument, values) for argument in step.run]
    for expect in recipe.expect:
        expect.file = interpolate.fill(expect.file, values)
    for key, value in recipe.env.items():
        recipe.env[key] = interpolate.fill(value, values)
