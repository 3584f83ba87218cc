"""What a row asks and what answers it, whatever its form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar, Union

from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

RowId = Union[str, int, None]

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """What a row asks.

    Attributes:
        query, chat, history: as `QwenVL.stream` takes them.
        system: the system message; None: the usual one.
        model: the name by which the row calls the model, for the output.
    """

    query: list[dict[str, Any]]
    options: GenerationOptions
    chat: bool = False
    history: list[tuple[Query, str]] = field(default_factory=list)
    system: Optional[str] = None
    model: str = "qwen-vl"


@dataclass(frozen=True)
class Reply:
    """An answered request."""

    answer: Answer
    n_prompt_tokens: int
    model: str

    @property
    def usage(self) -> dict[str, int]:
        """The tokens of the prompt and of the answer, end token included."""
        n_new = len(self.answer.token_ids)
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": n_new,
            "total_tokens": self.n_prompt_tokens + n_new,
        }


def check_keys(values: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """Refuse a key that is not known."""
    for key in values:
        if key not in known:
            raise UsageError(f"{where}{key}: unknown key; known keys: {', '.join(sorted(known))}")


def check_type(value: Any, kind: type[T], where: str) -> T:
    """`value`, which must be of this type."""
    if not isinstance(value, kind):
        names = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}
        raise UsageError(f"{where} must be {names[kind]}")
    return value
