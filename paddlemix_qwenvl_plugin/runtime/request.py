"""What a front end asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional, Union

from paddlemix_qwenvl_plugin.processing.prompts import Part, Query
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    Attributes:
        parts: text, or a list of {"image": …}, {"text": …} and {"box": …, "ref": …} (processing/prompts.py).
        options: sampling parameters and limits.
        chat: use the ChatML form of Qwen-VL-Chat and stop at its turn tokens; False: the base model's form; None: what
            the model folder says.
        history: earlier turns (query, answer), chat only.
        system: the system message, chat only.
    """

    parts: Union[str, Sequence[Part]]
    options: GenerationOptions = field(default_factory=GenerationOptions)
    chat: Optional[bool] = None
    history: Sequence[tuple[Query, str]] = ()
    system: str = DEFAULT_SYSTEM
