"""Griffe extension: document pydantic fields from their annotations.

`Annotated[int, Field(ge=1, description="Maximum number of tokens.")]` becomes an `int` with the docstring "Maximum
number of tokens. At least 1." The annotations are read from the source; the module is not imported.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe

_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class PydanticFields(griffe.Extension):
    """Extension that sets the docstrings and plain types of annotated fields."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        arguments = _annotated(attr.annotation)
        fields = [item for item in arguments[1:] if isinstance(item, griffe.ExprCall)]
        if attr.docstring or not fields:
            return
        keywords = {
            argument.name: str(argument.value)
            for argument in fields[0].arguments
            if isinstance(argument, griffe.ExprKeyword)
        }
        if "description" not in keywords:
            return
        text = ast.literal_eval(keywords["description"])
        bounds = ", ".join(f"{words} {keywords[name]}" for name, words in _BOUNDS.items() if name in keywords)
        if bounds:
            text += f" {bounds.capitalize()}."
        attr.docstring = griffe.Docstring(text, parent=attr)
        attr.annotation = _plain_type(arguments[0], attr)


def _annotated(annotation: Any) -> list[Any]:
    """Return the arguments of `Annotated[...]`; an empty list for another annotation."""
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left).split(".")[-1] == "Annotated":
        return list(annotation.slice.elements) if isinstance(annotation.slice, griffe.ExprTuple) else []
    return []


def _plain_type(annotation: Any, attr: griffe.Attribute) -> Any:
    """Resolve an alias of the same module, such as `Texts = Annotated[list[str], …]`, to the type `list[str]`.

    Another annotation is returned unchanged.
    """
    alias = attr.module.members.get(str(annotation))
    value = alias.value if isinstance(alias, griffe.Attribute) else None
    arguments = _annotated(value)
    return arguments[0] if arguments else annotation
