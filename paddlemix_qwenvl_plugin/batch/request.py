"""Request and reply of a row, independent of its format, and checks that the parsers of both formats use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, Union

from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

RowId = Union[str, int, None]

T = TypeVar("T")


@dataclass(frozen=True)
class RowRequest:
    """Request of a row.

    Attributes:
        model: in OpenAI's format the row's model name, which may be that of an adapter and which the output repeats.
            Of a row without a name, and in the plain format, the default.
    """

    request: Request
    model: str = "qwen-vl"


@dataclass(frozen=True)
class Reply:
    """Answer to a row with its token counts; `model` is that of the RowRequest."""

    answer: Answer
    n_prompt_tokens: int
    n_new_tokens: int
    model: str

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of prompt and answer, stop token included."""
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": self.n_new_tokens,
            "total_tokens": self.n_prompt_tokens + self.n_new_tokens,
        }


def check_keys(values: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Raise UsageError for the first unknown key."""
    for key in values:
        if key not in known:
            raise UsageError(f"{where}{key}: unknown key; known keys: {', '.join(sorted(known))}")


def check_type(value: Any, kind: type[T], where: str) -> T:
    """Return `value`; raise UsageError unless it has this type."""
    if not isinstance(value, kind):
        names = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}
        raise UsageError(f"{where} must be {names[kind]}")
    return value
