"""Requests to a model: a prompt with its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional, Union

from paddlemix_qwenvl_plugin.processing.prompts import Part, Query
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Request:
    """A prompt with its options, for `QwenVL.generate_batch` and for `ask` of any model (runtime/model.py).

    Attributes:
        parts: text, or a list of {"image": …}, {"text": …} and {"box": …, "ref": …} (processing/prompts.py).
        options: sampling parameters and limits.
        chat: True: the ChatML form of Qwen-VL-Chat, with its stop tokens; False: the base model's form; None: the form
            of the model (`QwenVL.is_chat`).
        history: earlier turns (query, answer), chat only. Unlike `parts`, a query that is a text is a rendered prompt
            (Query in processing/prompts.py) for QwenVL, and plain text for a server's model.
        system: the system message, chat only.
        adapter: name of an adapter of the model; None: the model without an adapter.
    """

    parts: Union[str, Sequence[Part]]
    options: GenerationOptions = field(default_factory=GenerationOptions)
    chat: Optional[bool] = None
    history: Sequence[tuple[Query, str]] = ()
    system: str = DEFAULT_SYSTEM
    adapter: Optional[str] = None

    def refuse_history(self) -> None:
        """Raise UsageError if there are earlier turns, which only a chat prompt has."""
        if self.history:
            raise UsageError("history: only a chat prompt has earlier turns; pass chat=True")
