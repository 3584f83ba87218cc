"""Model of an OpenAI-compatible server, for `qwenvl chat` and `qwenvl batch`."""

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
from paddlemix_qwenvl_plugin.remote.errors import RefusedError, invalid_response
from paddlemix_qwenvl_plugin.remote.server import Server
from paddlemix_qwenvl_plugin.remote.stream import End, ServerStream
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_CHAT, _COMPLETION = "/v1/chat/completions", "/v1/completions"


class ServerModel:
    """The first model listed by a server, as a Model (runtime/model.py). Images are read on this machine."""

    # Part of the identity of a batch job. The server chooses the label that the prompts contain.
    picture_label = "as the server has it"

    def __init__(
        self, server: Server, allow_http: bool = False, limits: Optional[ImageLimits] = None
    ) -> None:
        """Create the model; no request is sent. `allow_http` and `limits`: see QwenVL.from_exported."""
        self.server = server
        self._allow_http = allow_http
        self._limits = limits or ImageLimits()
        self._is_chat = True  # until the server reports a base model

    @cached_property
    def _names(self) -> list[str]:
        """Names of the server's models. Raises as `name`."""
        models = self.server.start(self.server.get("/v1/models")).result()
        try:
            names = [str(model["id"]) for model in models["data"]]
        except (KeyError, TypeError) as error:
            raise invalid_response(self.server.url) from error
        if not names:
            raise invalid_response(self.server.url)
        return names

    @property
    def name(self) -> str:
        """Name of the first model on the server.

        Raises:
            QwenVLError: the server cannot be reached, its response is invalid, or it reports an error, for example that
                it is busy or that the API key is wrong.
        """
        return self._names[0]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the server's other models: adapters of the first, on a server of this package. Raises as `name`."""
        return tuple(self._names[1:])

    @property
    def weights(self) -> list[str]:
        """Strings that identify the model, independent of the server's URL."""
        return ["server", self.name]

    def load(self) -> None:
        """Check that the server can be reached. Raises as `name`."""
        _ = self.name

    def load_images(self, sources: Sequence[Any], folder: Optional[Path] = None) -> list[Image.Image]:
        """Load images subject to `allow_http` and `limits`; relative paths are resolved against `folder`."""
        return [
            load_image(from_folder(source, folder), allow_http=self._allow_http, limits=self._limits)
            for source in sources
        ]

    def chat(self, system: str = DEFAULT_SYSTEM, adapter: Optional[str] = None) -> ServerChat:
        """Start a conversation, with the model named `adapter` if it is not None."""
        return ServerChat(self, system, adapter)

    def ask(self, request: Request, folder: Optional[Path] = None) -> ServerStream:
        """Answer a request without streaming; retry while the server is busy.

        Raises:
            UsageError, QwenVLError: an invalid part, image or history, which the message names; or as `name`. Errors of
                the request are raised by the stream.
        """
        start = time.perf_counter()
        reader = self.reader(lambda source: from_folder(source, folder))
        if request.chat is False:
            request.refuse_history()
        conversation = body.messages(reader, request.parts, request.history, request.system)
        parameters = {"model": request.adapter or self.name, **body.parameters(request.options)}

        async def work(deliver: Callable[[str], None]) -> End:
            if request.chat or (request.chat is None and self._is_chat):
                try:
                    response = await self.server.post(_CHAT, {**parameters, "messages": conversation})
                except RefusedError as error:
                    # With param "model", a server of this package refuses chat requests to a base model.
                    if request.chat or error.param != "model":
                        raise
                    self._is_chat = False
                else:
                    return self._end(response, deliver)
            request.refuse_history()
            prompt = conversation[-1]["content"]
            response = await self.server.post(_COMPLETION, {**parameters, "prompt": prompt})
            return self._end(response, deliver)

        return ServerStream(self.server, work, reader.image_size, time.perf_counter() - start)

    def wait_any(self, streams: Collection[ServerStream]) -> list[ServerStream]:
        """Wait until at least one of the submitted streams is done; return all that are done."""
        wait([stream.future for stream in streams], return_when=FIRST_COMPLETED)
        return [stream for stream in streams if stream.future.done()]

    def reader(self, locate: Callable[[Any], Any] = lambda source: source) -> body.ContentReader:
        """Create a ContentReader with the model's image options."""
        return body.ContentReader(self._allow_http, self._limits, locate)

    def _end(self, response: dict[str, Any], deliver: Callable[[str], None]) -> End:
        try:
            [choice] = response["choices"]
            deliver(choice["message"]["content"] if "message" in choice else choice["text"])
            usage = response["usage"]
            return End(choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise invalid_response(self.server.url) from error


class ServerChat:
    """Conversation (runtime/model.py) with a server's model. Each question resends all earlier turns.

    Attributes:
        system: system message.
    """

    def __init__(self, model: ServerModel, system: str, adapter: Optional[str] = None) -> None:
        self._model = model
        self._adapter = adapter
        self.system = system
        self.clear()

    def clear(self) -> None:
        """Remove all turns."""
        self._history: list[dict[str, Any]] = []
        self._image_size: Optional[tuple[int, int]] = None

    def ask(self, query: Query, **options: Any) -> ServerStream:
        """Answer the next turn as a stream; see `Chat.ask`."""
        start = time.perf_counter()
        generation_options = GenerationOptions.of(options)
        reader = self._model.reader()
        question = body.user(reader.read(query))
        image_size = reader.image_size or self._image_size
        request = {
            "model": self._adapter or self._model.name,
            "messages": [{"role": "system", "content": self.system}, *self._history, question],
            "stream": True,
            "stream_options": {"include_usage": True},
            **body.parameters(generation_options),
        }

        # Called when the stream ends without an error, also if it is stopped, unless no token has arrived.
        def remember(answer: Answer) -> None:
            self._history += [question, body.assistant(answer.text.strip())]
            self._image_size = image_size

        work = partial(_streamed, self._model.server, request)
        return ServerStream(self._model.server, work, image_size, time.perf_counter() - start, remember)


async def _streamed(server: Server, request: dict[str, Any], deliver: Callable[[str], None]) -> End:
    """Send a request with "stream": true; pass the text of each event to `deliver`, and return the End."""
    finish_reason: Optional[str] = None
    usage: dict[str, int] = {}
    n_texts = 0
    async for event in server.events(_CHAT, request):
        try:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                finish_reason = choice.get("finish_reason") or finish_reason
                if text := choice["delta"].get("content"):
                    n_texts += 1
                    deliver(text)
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid_response(server.url) from error
    if finish_reason is None:
        raise QwenVLError(f"{server.url}: the stream ended before the answer was complete")
    return End(finish_reason, usage.get("prompt_tokens", 0), usage.get("completion_tokens", n_texts))
