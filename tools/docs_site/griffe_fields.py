"""Griffe extension: document pydantic fields from their annotations.

`Annotated[int, Field(ge=1, description="Most tokens.")]` becomes an `int` with the docstring "Most tokens. At least
1.", read from the source, without an import of the module.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe

_BOUNDS = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}


class PydanticFields(griffe.Extension):
    """Docstrings and plain types of annotated fields."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        arguments = _annotated(attr.annotation)
        fields = [item for item in arguments[1:] if isinstance(item, griffe.ExprCall)]
        if attr.docstring or not fields:
            return
        given = {
            argument.name: str(argument.value)
            for argument in fields[0].arguments
            if isinstance(argument, griffe.ExprKeyword)
        }
        if "description" not in given:
            return
        text = ast.literal_eval(given["description"])
        bounds = ", ".join(f"{words} {given[name]}" for name, words in _BOUNDS.items() if name in given)
        attr.docstring = griffe.Docstring(f"{text} {bounds.capitalize()}." if bounds else text, parent=attr)
        attr.annotation = _plain(arguments[0], attr)


def _annotated(annotation: Any) -> list[Any]:
    """The arguments of `Annotated[...]`; empty for another annotation."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left).split(".")[-1] == "Annotated":
        return list(annotation.slice.elements) if isinstance(annotation.slice, griffe.ExprTuple) else []
    return []


def _plain(annotation: Any, attr: griffe.Attribute) -> Any:
    """The type behind an alias of the same module such as `Texts = Annotated[list[str], …]`."""
    alias = attr.module.members.get(str(annotation))
    value = alias.value if isinstance(alias, griffe.Attribute) else None
    return (_annotated(value) or [annotation])[0]
