"""References `${name}` in a recipe's text: known names, validation, substitution."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")

# Filled in when the recipe is loaded, so that a resolved recipe can run from any folder.
LOAD_NAMES = ("recipe_dir",)
# Filled in by a run, together with `assets.NAME` of each asset.
RUN_NAMES = ("seed", "dtype", "run_dir", "python")


def check(text: str, known: Iterable[str]) -> None:
    """Raise ValueError if `text` has an unknown or unclosed reference."""
    known = list(known)
    for name in _REFERENCE.findall(text):
        if name not in known:
            raise ValueError(
                f"unknown ${{{name}}} in {text!r}; known: {', '.join(f'${{{k}}}' for k in known)}"
            )
    if "${" in _REFERENCE.sub("", text):
        raise ValueError(f"'${{' without its '}}' in {text!r}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Replace each `${name}` whose name is in `values`; keep other references."""
    return _REFERENCE.sub(lambda match: values.get(match[1], match[0]), text)
