"""The base of the request schemas: no parameter goes unread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Schema(BaseModel):
    """An object of a request. Types are JSON's own: "1" is no number. null is the same as not given.

    Attributes:
        not_supported: parameters that OpenAI has and this server has not, with the values that ask for nothing that
            is missing. Such a value, or an empty one, is accepted, for clients that always send it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Refuse the first parameter that is not known, rather than list a million of them."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in cls.model_fields:
                continue
            shown = {
                "name": name.encode("utf-8", "replace").decode()
            }  # pydantic takes no half surrogate pair
            if name not in cls.not_supported:
                raise PydanticCustomError("unknown_parameter", "is no parameter of this server", shown)
            if value and value not in cls.not_supported[name]:
                raise PydanticCustomError("unsupported_parameter", "is not supported by this server", shown)
        return {name: value for name, value in values.items() if name in cls.model_fields}
