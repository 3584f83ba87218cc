"""Pydantic field types for pip requirements, version ranges and versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import AfterValidator


def _valid_for(parse: Callable[[str], object], what: str) -> AfterValidator:
    def check(value: str) -> str:
        try:
            parse(value)
        except ValueError as error:
            raise ValueError(f"not {what}: {value!r}") from error
        return value

    return AfterValidator(check)


RequirementText = Annotated[str, _valid_for(Requirement, "a requirement such as 'numpy>=1.24'")]
SpecifierText = Annotated[str, _valid_for(SpecifierSet, "a version range such as '>=3.0,<3.4'")]
VersionText = Annotated[str, _valid_for(Version, "a version such as '3.0.0'")]
