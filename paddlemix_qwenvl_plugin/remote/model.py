"""A model that a server has, as `qwenvl chat` and `qwenvl batch` take one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from paddlemix_qwenvl_plugin.processing.images import ImageLimits, from_folder, load_image
from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.remote import body
from paddlemix_qwenvl_plugin.remote.errors import RefusedError, no_openai_form
from paddlemix_qwenvl_plugin.remote.server import Server
from paddlemix_qwenvl_plugin.remote.stream import End, ServerStream
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


class ServerModel:
    """The first model that a server lists. As QwenVL, where both have a method; images are read on this machine."""

    picture_label = "as the server has it"

    def __init__(
        self, server: Server, allow_http: bool = False, limits: Optional[ImageLimits] = None
    ) -> None:
        """`allow_http` and `limits`: see QwenVL.from_exported."""
        self.server = server
        self._allow_http = allow_http
        self._limits = limits or ImageLimits()
        self._is_chat = True  # until the server says that its model is not

    @cached_property
    def name(self) -> str:
        """What the server calls its model.

        Raises:
            QwenVLError: there is no such server; the line names its URL.
        """
        models = self.server.start(self.server.get("/v1/models")).result()
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise no_openai_form(self.server.url) from error

    @property
    def weights(self) -> list[str]:
        """What tells this model from others, wherever its server is."""
        return ["server", self.name]

    def load(self) -> None:
        """Ask whether the server is there. Errors as of `name`."""
        _ = self.name

    def load_images(self, sources: Sequence[Any], folder: Optional[Path] = None) -> list[Image.Image]:
        """Open images as `allow_http` and `limits` let it; relative paths start from `folder`."""
        return [
            load_image(from_folder(source, folder), allow_http=self._allow_http, limits=self._limits)
            for source in sources
        ]

    def chat(self, system: str = DEFAULT_SYSTEM) -> ServerChat:
        """Begin a conversation."""
        return ServerChat(self, system)

    def ask(self, request: Request, folder: Optional[Path] = None) -> ServerStream:
        """Answer a request, whole; while the server is busy it is asked again.

        Raises:
            UsageError, QwenVLError: one line that names the part or the image.
        """
        start = time.perf_counter()
        reader = self.reader(lambda source: from_folder(source, folder))
        if request.chat is False and request.history:
            raise UsageError("history: only a chat prompt has earlier turns; pass chat=True")
        conversation = body.messages(reader, request.parts, request.history, request.system)
        parameters = {"model": self.name, **body.parameters(request.options)}

        async def work(hand_on: Callable[[str], None]) -> End:
            if request.chat or (request.chat is None and self._is_chat):
                try:
                    answer = await self.server.post(_CHAT, {**parameters, "messages": conversation})
                except RefusedError as error:
                    if request.chat or error.param != "model":
                        raise
                    self._is_chat = False
                else:
                    return self._end(answer, hand_on)
            prompt = conversation[-1]["content"]
            return self._end(await self.server.post(_COMPLETION, {**parameters, "prompt": prompt}), hand_on)

        return ServerStream(self.server, work, reader.image_size, time.perf_counter() - start)

    def wait_any(self, streams: Collection[ServerStream]) -> list[ServerStream]:
        """Wait until at least one of these submitted streams is done; those that are."""
        wait([stream.future for stream in streams], return_when=FIRST_COMPLETED)
        return [stream for stream in streams if stream.future.done()]

    def reader(self, locate: Callable[[Any], Any] = lambda source: source) -> body.ContentReader:
        """What makes contents of queries; see ContentReader."""
        return body.ContentReader(self._allow_http, self._limits, locate)

    def _end(self, answer: dict[str, Any], hand_on: Callable[[str], None]) -> End:
        try:
            [choice] = answer["choices"]
            hand_on(choice["message"]["content"] if "message" in choice else choice["text"])
            usage = answer["usage"]
            return End(choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise no_openai_form(self.server.url) from error


class ServerChat:
    """A conversation, as Chat. The server keeps nothing of it: each question sends it all again.

    Attributes:
        system: the system message.
    """

    def __init__(self, model: ServerModel, system: str) -> None:
        self._model = model
        self.system = system
        self.clear()

    def clear(self) -> None:
        """Forget all turns."""
        self._history: list[dict[str, Any]] = []
        self._image_size: Optional[tuple[int, int]] = None

    def ask(self, query: Query, **options: Any) -> ServerStream:
        """Answer the next turn, in pieces; as `Chat.ask`."""
        start = time.perf_counter()
        chosen = GenerationOptions.of(options)
        reader = self._model.reader()
        question = body.user(reader.read(query))
        image_size = reader.image_size or self._image_size
        asked = {
            "model": self._model.name,
            "messages": [{"role": "system", "content": self.system}, *self._history, question],
            "stream": True,
            "stream_options": {"include_usage": True},
            **body.parameters(chosen),
        }

        def remember(answer: Answer) -> None:
            self._history += [question, body.assistant(answer.text.strip())]
            self._image_size = image_size

        work = partial(_streamed, self._model.server, asked)
        return ServerStream(self._model.server, work, image_size, time.perf_counter() - start, remember)


async def _streamed(server: Server, asked: dict[str, Any], hand_on: Callable[[str], None]) -> End:
    """Hand on the text of a stream's events."""
    finish_reason: Optional[str] = None
    usage: dict[str, int] = {}
    n_texts = 0
    async for event in server.events(_CHAT, asked):
        try:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                if text := choice["delta"].get("content"):
                    n_texts += 1
                    hand_on(text)
        except (KeyError, TypeError, AttributeError) as error:
            raise no_openai_form(server.url) from error
    if finish_reason is None:
        raise QwenVLError(f"{server.url}: the answer broke off before its end")
    return End(finish_reason, usage.get("prompt_tokens", 0), usage.get("completion_tokens", n_texts))
