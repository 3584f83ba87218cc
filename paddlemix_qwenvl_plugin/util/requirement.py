"""A pip requirement as the type of a pydantic field."""

from __future__ import annotations

from typing import Annotated

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import AfterValidator


def _requirement(value: str) -> str:
    try:
        Requirement(value)
    except InvalidRequirement as error:
        raise ValueError(f"not a requirement such as 'numpy>=1.24': {value!r}") from error
    return value


RequirementText = Annotated[str, AfterValidator(_requirement)]
