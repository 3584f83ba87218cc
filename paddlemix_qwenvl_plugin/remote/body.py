"""Requests as OpenAI's form has them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any, Optional

from PIL import Image

from paddlemix_qwenvl_plugin.processing.images import ImageLimits, decode_image, describe_source, read_encoded
from paddlemix_qwenvl_plugin.processing.prompts import Part, Query, render
from paddlemix_qwenvl_plugin.processing.quiet import quiet
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

Content = list[dict[str, Any]]


class ContentReader:
    """Makes contents of queries: images are read and checked here, and sent as data: URLs.

    Attributes:
        image_size: (width, height) of the last image that was read; None before one.
    """

    def __init__(
        self, allow_http: bool, limits: ImageLimits, locate: Callable[[Any], Any] = lambda s: s
    ) -> None:
        """Args:
        allow_http, limits: see load_image.
        locate: what a source of a query stands for, as a relative path.
        """
        self._allow_http = allow_http
        self._limits = limits
        self._locate = locate
        self.image_size: Optional[tuple[int, int]] = None

    def read(self, query: Query) -> Content:
        """The content that is a query.

        Raises:
            UsageError, QwenVLError: one line that names the part or the image.
        """
        parts: Sequence[Part] = [{"text": query}] if isinstance(query, str) else query
        render(parts)  # says what is wrong with them
        return [
            {"type": "image_url", "image_url": {"url": self._data_url(self._locate(part["image"]))}}
            if "image" in part
            else {"type": "text", "text": render([part])[0]}
            for part in parts
        ]

    def _data_url(self, source: Any) -> str:
        encoded = read_encoded(source, allow_http=self._allow_http, limits=self._limits)
        self.image_size = decode_image(encoded, describe_source(source), self._limits).size
        with quiet(), Image.open(io.BytesIO(encoded)) as image:
            kind = image.get_format_mimetype() or "application/octet-stream"
        return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def messages(
    reader: ContentReader, query: Query, history: Sequence[tuple[Query, str]], system: str
) -> list[dict[str, Any]]:
    """The messages of a conversation; errors as for `ContentReader.read`."""
    made: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for asked, answer in history:
        made += [user(reader.read(asked)), assistant(answer)]
    return [*made, user(reader.read(query))]


def user(content: Content) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(answer: str) -> dict[str, Any]:
    """An earlier answer."""
    return {"role": "assistant", "content": answer}


def parameters(options: GenerationOptions) -> dict[str, Any]:
    """Sampling parameters under OpenAI's names, and those that OpenAI has not under ours; only what is not a default.

    The temperature is always there: OpenAI's default is to sample, ours is not to.
    """
    sent: dict[str, Any] = {"max_tokens": options.max_new_tokens}
    if options.min_new_tokens:
        sent["min_tokens"] = options.min_new_tokens
    if options.greedy:
        sent["temperature"] = 0.0
    else:
        sent["temperature"] = 1.0 if options.temperature is None else options.temperature
        sent.update(
            {
                name: value
                for name in ("top_p", "top_k", "seed")
                if (value := getattr(options, name)) is not None
            }
        )
    for name, default in (("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0)):
        if getattr(options, name) != default:
            sent[name] = getattr(options, name)
    return sent
