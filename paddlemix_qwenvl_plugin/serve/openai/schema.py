"""Base class of the request schemas, which refuses unknown parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Schema(BaseModel):
    """Base class of request objects. JSON types are strict: "1" is not a number.

    For an optional parameter, null equals omission: a subclass declares it as Optional, with None as its default.

    Attributes:
        not_supported: OpenAI's parameters that this server does not support, with their accepted values. Accepted
            values, and null, false, 0 and empty ones, request the behaviour that the server has anyway; some clients
            always send them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Refuse the first unknown or unsupported parameter; pydantic would report all, possibly many thousands."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in cls.model_fields:
                continue
            context = {"name": name.encode("utf-8", "replace").decode()}  # pydantic refuses lone surrogates
            if name not in cls.not_supported:
                raise PydanticCustomError("unknown_parameter", "is not a parameter of this server", context)
            if value and value not in cls.not_supported[name]:
                raise PydanticCustomError("unsupported_parameter", "is not supported by this server", context)
        return {name: value for name, value in values.items() if name in cls.model_fields}
