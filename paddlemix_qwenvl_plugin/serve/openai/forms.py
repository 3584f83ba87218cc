"""JSON of chat.completion and text_completion objects, complete or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol

from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.answer import box_as_dict
from paddlemix_qwenvl_plugin.serve.openai import logprobs
from paddlemix_qwenvl_plugin.serve.openai.choice import Event
from paddlemix_qwenvl_plugin.serve.openai.completion_text import Delta
from paddlemix_qwenvl_plugin.serve.openai.json_text import dumps


@dataclass
class Choice:
    """Choice of a response that is not streamed, accumulated from its events."""

    delta: Delta = field(default_factory=Delta)
    finish_reason: Optional[str] = None
    image_size: Optional[tuple[int, int]] = None

    def add(self, event: Event) -> None:
        """Add an event of this choice."""
        self.delta.extend(event.delta)
        self.finish_reason, self.image_size = event.finish_reason, event.image_size


class Form(Protocol):
    """Response format of an endpoint."""

    def chunk(self, event: Event) -> str:
        """Return the JSON of an event's chunk."""

    def usage_chunk(self, usage: Mapping[str, Any]) -> str:
        """Return the JSON of the chunk that contains the usage, the last of a stream."""

    def complete(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the object of a response that is not streamed."""


class ChatForm:
    """Form of chat.completion and chat.completion.chunk. The first chunk of a choice contains the role."""

    def __init__(self, model: str, tokenizer: QwenTokenizer, with_logprobs: bool, with_usage: bool) -> None:
        """Create the form; `with_usage` writes `"usage":null` into each chunk but the usage chunk, as OpenAI does."""
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._head = _Head("chatcmpl", model, "chat.completion.chunk", with_usage)
        self._begun: set[int] = set()

    def chunk(self, event: Event) -> str:
        """Return the JSON of an event's chunk."""
        text, boxes, tokens = event.delta.text, event.delta.boxes, event.delta.tokens
        fields = []
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            fields.append('"role":"assistant"')
        if text or fields:
            fields.append(f'"content":{dumps(text)}')
        if boxes:
            fields.append(f'"boxes":{dumps([box_as_dict(box, event.image_size) for box in boxes])}')
        logprobs_json = dumps(logprobs.of_chat(self._tokenizer, tokens)) if self._with_logprobs else "null"
        reason = f'"{event.finish_reason}"' if event.finish_reason else "null"
        # Written by hand, since it is faster than `dumps` and a stream has many chunks.
        return self._head.chunk(
            f'{{"index":{event.choice},"delta":{{{",".join(fields)}}},"logprobs":{logprobs_json},'
            f'"finish_reason":{reason}}}'
        )

    def usage_chunk(self, usage: Mapping[str, Any]) -> str:
        """Return the JSON of the usage chunk."""
        return self._head.usage_chunk(usage)

    def complete(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the chat.completion object."""
        return {
            **self._head.fields,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": choice.delta.text,
                        "refusal": None,
                        "boxes": [box_as_dict(box, choice.image_size) for box in choice.delta.boxes],
                    },
                    "logprobs": logprobs.of_chat(self._tokenizer, choice.delta.tokens)
                    if self._with_logprobs
                    else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage,
        }


class TextForm:
    """Form of text_completion, complete or in chunks."""

    def __init__(self, model: str, tokenizer: QwenTokenizer, with_logprobs: bool, with_usage: bool) -> None:
        """Create the form; `with_usage` as for ChatForm."""
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._head = _Head("cmpl", model, "text_completion", with_usage)

    def chunk(self, event: Event) -> str:
        """Return the JSON of an event's chunk."""
        choice = self._choice(event.choice, event.delta, event.image_size, event.finish_reason)
        return self._head.chunk(dumps(choice))

    def usage_chunk(self, usage: Mapping[str, Any]) -> str:
        """Return the JSON of the usage chunk."""
        return self._head.usage_chunk(usage)

    def complete(self, choices: Sequence[Choice], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text_completion object."""
        choice_objects = [
            self._choice(index, choice.delta, choice.image_size, choice.finish_reason)
            for index, choice in enumerate(choices)
        ]
        return {**self._head.fields, "choices": choice_objects, "usage": usage}

    def _choice(
        self, index: int, delta: Delta, image_size: Optional[tuple[int, int]], finish_reason: Optional[str]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "boxes": [box_as_dict(box, image_size) for box in delta.boxes],
            "logprobs": logprobs.of_text(self._tokenizer, delta.tokens) if self._with_logprobs else None,
            "finish_reason": finish_reason,
        }


class _Head:
    """Common fields of a complete response and of all chunks of a stream; for the chunks they are serialized once."""

    def __init__(self, id_prefix: str, model: str, object_name: str, with_usage: bool) -> None:
        self.fields = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": model,
        }
        self._before = dumps(self.fields)[:-1] + ',"choices":['
        self._after = '],"usage":null}' if with_usage else "]}"

    def chunk(self, choice: str) -> str:
        """Return the JSON of a chunk with one choice."""
        return f"{self._before}{choice}{self._after}"

    def usage_chunk(self, usage: Mapping[str, Any]) -> str:
        """Return the JSON of the last chunk, which has the usage and no choices."""
        return f'{self._before}],"usage":{dumps(usage)}}}'
