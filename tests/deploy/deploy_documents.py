"""The YAML files of deploy/, and every variant of one with a misspelt key."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Maps whose keys are the user's own.
FREE = {"args", "labels", "limits", "matchLabels", "rayStartParams", "requests"}


def documents(path: str) -> list[dict[str, Any]]:
    """The documents of a file."""
    found: list[dict[str, Any]] = [
        one for one in yaml.safe_load_all((DEPLOY / path).read_text("utf-8")) if one is not None
    ]
    assert found, path
    return found


def misspelt(document: Any, free: set[str] = FREE) -> Iterator[tuple[str, Any]]:
    """(path of the key, the document with an x at the end of that key) for each key of a fixed name."""

    def keys(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(node, dict):
            for key, value in node.items():
                if not path or path[-1] not in free:
                    yield (*path, key)
                yield from keys(value, (*path, key))
        elif isinstance(node, list):
            for number, value in enumerate(node):
                yield from keys(value, (*path, number))

    for path in list(keys(document, ())):
        changed = copy.deepcopy(document)
        parent = changed
        for step in path[:-1]:
            parent = parent[step]
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
        yield ".".join(map(str, path)), changed


def accepted(
    check: Callable[[Any], Any], document: Any, errors: tuple[type[Exception], ...], free: set[str] = FREE
) -> list[str]:
    """Keys whose misspelling a check does not find."""
    found, n = [], 0
    for n, (key, changed) in enumerate(misspelt(document, free), 1):  # noqa: B007
        try:
            check(changed)
        except errors:
            continue
        found.append(key)
    assert n > 0
    return found
