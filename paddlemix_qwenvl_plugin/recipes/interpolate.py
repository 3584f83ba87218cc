"""`${name}` in a recipe's text: which names there are, and how they are filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")

# Filled in when the recipe is read, so that a resolved recipe can be run from anywhere.
LOAD_NAMES = ("recipe_dir",)
# Filled in when a step is about to run; `assets.NAME` comes on top, one for each asset.
RUN_NAMES = ("seed", "dtype", "run_dir", "python")


def check(text: str, known: Iterable[str]) -> None:
    """Raise ValueError when `text` has a reference that is not in `known`, or one that is not closed."""
    known = list(known)
    for name in _REFERENCE.findall(text):
        if name not in known:
            raise ValueError(
                f"unknown ${{{name}}} in {text!r}; known: {', '.join(f'${{{k}}}' for k in known)}"
            )
    if "${" in _REFERENCE.sub("", text):
        raise ValueError(f"'${{' without its '}}' in {text!r}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace each `${name}` that `values` has; other references stay as they are."""
    return _REFERENCE.sub(lambda match: values.get(match[1], match[0]), text)
