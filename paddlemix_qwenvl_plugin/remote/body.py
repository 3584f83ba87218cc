"""Request bodies in OpenAI's format."""

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
    """Converter of queries to message contents; reads and checks images and embeds them as data: URLs.

    Attributes:
        image_size: (width, height) of the last image read; None before the first.
    """

    def __init__(
        self, allow_http: bool, limits: ImageLimits, locate: Callable[[Any], Any] = lambda s: s
    ) -> None:
        """Set the options of image loading.

        Args:
            allow_http, limits: see processing.images.load_image.
            locate: resolves the source of an image, such as a relative path.
        """
        self._allow_http = allow_http
        self._limits = limits
        self._locate = locate
        self.image_size: Optional[tuple[int, int]] = None

    def read(self, query: Query) -> Content:
        """Convert a query to the `content` of an OpenAI message; a query that is a text is plain text, not rendered.

        Raises:
            UsageError, QwenVLError: an invalid part or image; the message names it.
        """
        parts: Sequence[Part] = [{"text": query}] if isinstance(query, str) else query
        render(parts)  # raises for invalid parts
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
    """Build the messages of a conversation. Raises as `ContentReader.read`."""
    earlier: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for question, answer in history:
        earlier += [user(reader.read(question)), assistant(answer)]
    return [*earlier, user(reader.read(query))]


def user(content: Content) -> dict[str, Any]:
    """Build a user message."""
    return {"role": "user", "content": content}


def assistant(answer: str) -> dict[str, Any]:
    """Build an assistant message from an earlier answer."""
    return {"role": "assistant", "content": answer}


def parameters(options: GenerationOptions) -> dict[str, Any]:
    """Convert options to request parameters, under OpenAI's names where they exist; omit defaults.

    max_tokens and the temperature are always sent, since the defaults of servers differ: OpenAI samples by default, and
    this package does not.
    """
    sent: dict[str, Any] = {"max_tokens": options.max_new_tokens}
    if options.min_new_tokens:
        sent["min_tokens"] = options.min_new_tokens
    if options.greedy:
        sent["temperature"] = 0.0
    else:
        sent["temperature"] = 1.0 if options.temperature is None else options.temperature
        for name in ("top_p", "top_k", "seed"):
            if getattr(options, name) is not None:
                sent[name] = getattr(options, name)
    for name, default in (("repetition_penalty", 1.0), ("frequency_penalty", 0.0), ("presence_penalty", 0.0)):
        if getattr(options, name) != default:
            sent[name] = getattr(options, name)
    return sent
