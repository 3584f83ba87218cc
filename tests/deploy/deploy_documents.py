"""Documents of the YAML files in deploy/, and their variants with a misspelt key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Maps whose keys no schema lists: labels, resources, arguments of an application, parameters of `ray start`.
MAPS_WITH_USER_KEYS = {"args", "labels", "limits", "matchLabels", "rayStartParams", "requests"}


def documents(path: str) -> list[dict[str, Any]]:
    """Read the documents of a YAML file in deploy/."""
    contents: list[dict[str, Any]] = [
        document
        for document in yaml.safe_load_all((DEPLOY / path).read_text("utf-8"))
        if document is not None
    ]
    assert contents, path
    return contents


def misspellings(
    document: Any, maps_with_user_keys: set[str] = MAPS_WITH_USER_KEYS
) -> Iterator[tuple[str, Any]]:
    """For each key of a document, yield the key's path and a copy of the document with an x appended to the key.

    Keys in the maps that `maps_with_user_keys` names are left as they are.
    """

    def key_paths(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(node, dict):
            for key, value in node.items():
                if not path or path[-1] not in maps_with_user_keys:
                    yield (*path, key)
                yield from key_paths(value, (*path, key))
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from key_paths(value, (*path, index))

    for path in list(key_paths(document, ())):
        variant = copy.deepcopy(document)
        parent = variant
        for key_or_index in path[:-1]:
            parent = parent[key_or_index]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        yield ".".join(map(str, path)), variant


def undetected_misspellings(
    check: Callable[[Any], Any],
    document: Any,
    errors: tuple[type[Exception], ...],
    maps_with_user_keys: set[str] = MAPS_WITH_USER_KEYS,
) -> list[str]:
    """List the keys whose misspelling a check accepts, that is, without raising one of `errors`."""
    undetected = []
    variants = list(misspellings(document, maps_with_user_keys))
    assert variants
    for key_path, variant in variants:
        try:
            check(variant)
        except errors:
            continue
        undetected.append(key_path)
    return undetected
