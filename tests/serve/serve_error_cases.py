"""Cases of the server's tables in docs/errors.md: CASES maps the column `request` to a function that sends it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Optional

import httpx
from PIL import Image

from paddlemix_qwenvl_plugin.checkpoint.config import load_config
from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.loop import NotFiniteError
from paddlemix_qwenvl_plugin.serve import image_process
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.app import create_app
from paddlemix_qwenvl_plugin.serve.engine_api import (
    Ended,
    EngineRequest,
    EngineStats,
    EngineUnavailable,
    Token,
)
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, line_of

NAME = "qwen-vl-chat"
CHAT_PATH, COMPLETIONS_PATH, TOKENIZE_PATH = "/v1/chat/completions", "/v1/completions", "/tokenize"
API_KEY = "a-key"


class ErrorResponse(NamedTuple):
    """Response with an error object, or the error event of a stream."""

    status: int
    error: dict[str, Any]
    headers: httpx.Headers


class Engine:
    """EngineClient that generates a few scripted tokens and then ends, fails or hangs as configured.

    Attributes:
        tokens: the ids of the tokens of each completion.
        submit_error: exception of `submit`, if any.
        error: exception of a stream after its tokens, if any.
        hangs: whether a stream without an error waits after its tokens until it is cancelled.
        finish_reason: finish reason of a stream that neither fails nor hangs.
    """

    def __init__(self) -> None:
        self.ready = True
        self.restarts = 0
        self.stats = EngineStats()
        self.tokens: list[int] = []
        self.submit_error: Optional[Exception] = None
        self.error: Optional[Exception] = None
        self.hangs = False
        self.finish_reason: Literal["length", "cancelled"] = "length"

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def submit(self, request: EngineRequest) -> Stream:
        if self.submit_error is not None:
            raise self.submit_error
        return Stream(self)


class Stream:
    """TokenStream of an `Engine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cancelled = asyncio.Event()
        self.ended: Optional[Ended] = None

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        for token in self._engine.tokens:
            yield [Token(token)]
        if self._engine.error is not None:
            raise self._engine.error
        if self._engine.hangs:
            await self._cancelled.wait()
            self.ended = Ended("cancelled", 0)
        else:
            self.ended = Ended(self._engine.finish_reason, 0)

    def cancel(self) -> None:
        self._cancelled.set()


class ConfigurableServer:
    """Apps around an `Engine`, one for each combination of settings, with image processes, slot queue and tokenizer.

    Bound to one event loop. `folder` is for files such as API keys.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine()
        self._config = load_config(MODEL)
        self._tokenizer = QwenTokenizer.of_model(MODEL, self._config)
        self._default_tokens = self._tokenizer.encode("a b c")
        self._apps: dict[str, tuple[Service, Any]] = {}
        self._settings: dict[str, Any] = {}

    def configure(self, is_chat: bool = True, **settings: Any) -> Service:
        """Use these settings for the next requests, and return the service that has them."""
        self._settings = {"is_chat": is_chat, **settings}
        return self._app()[0]

    def reset(self) -> None:
        """Restore the default settings and the default state of the engine."""
        self._settings = {}
        vars(self.engine).update(vars(Engine()))
        self.engine.tokens = self._default_tokens

    async def close(self) -> None:
        for service, _ in self._apps.values():
            await service.images.close()

    async def send(self, method: str, path: str, **request: Any) -> ErrorResponse:
        """Send a request and return its error, which in a stream is the last event."""
        transport = httpx.ASGITransport(self._app()[1])
        base = "http://127.0.0.1:8000"
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as client:
            response = await client.request(method, path, **request)
        if response.headers["content-type"].startswith("text/event-stream"):
            *_, last_event = response.text.strip().split("\n\n")
            error = json.loads(last_event[len("data: ") :])["error"]
            return ErrorResponse(response.status_code, error, response.headers)
        return ErrorResponse(response.status_code, response.json()["error"], response.headers)

    def _app(self) -> tuple[Service, Any]:
        """Service and app for the current settings."""
        values = dict(self._settings)
        key = repr(sorted(values.items()))
        if key not in self._apps:
            is_chat = values.pop("is_chat", True)
            settings = ServeSettings(**{"image_workers": 1, "image_timeout": 60, **values})
            service = Service(
                settings=settings,
                engine=self.engine,
                tokenizer=self._tokenizer,
                config=self._config,
                is_chat=is_chat,
                model_name=NAME,
                images=WorkerImageLoader(settings, self._config.visual.image_size),
                admission=SlotQueue(
                    settings.max_running, settings.max_waiting, settings.waiting_timeout, settings.max_per_key
                ),
            )
            self._apps[key] = service, create_app(service)
        return self._apps[key]


Case = Callable[[ConfigurableServer], Awaitable[ErrorResponse]]


def user_messages(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


QUESTION = [{"role": "user", "content": "?"}]
ASSISTANT_MESSAGE = {"role": "assistant", "content": "a"}
SYSTEM_MESSAGE = {"role": "system", "content": "a"}
TEXT_PART = {"type": "text", "text": "?"}
JSON_HEADERS = {"Content-Type": "application/json"}


def with_changes(path: str, valid_body: dict[str, Any], changes: dict[str, Any]) -> Case:
    """POST of a valid body with these parameters changed; an Ellipsis as the value removes the parameter."""
    changed = {**valid_body, **changes}
    body = {name: value for name, value in changed.items() if value is not ...}
    return lambda server: server.send("POST", path, json=body)


def chat(**changes: Any) -> Case:
    return with_changes(CHAT_PATH, {"model": NAME, "messages": QUESTION, "max_tokens": 4}, changes)


def completion(**changes: Any) -> Case:
    return with_changes(COMPLETIONS_PATH, {"model": NAME, "prompt": "a", "max_tokens": 4}, changes)


def chat_with_image(url: str) -> Case:
    return chat(messages=user_messages(image_part(url), TEXT_PART))


def png(size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "#c86432").save(buffer, kind)
    return buffer.getvalue()


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def with_settings(case: Case, **settings: Any) -> Case:
    """Case for a server with these settings."""

    def send(server: ConfigurableServer) -> Awaitable[ErrorResponse]:
        server.configure(**settings)
        return case(server)

    return send


def with_engine(case: Case, **attributes: Any) -> Case:
    """Case for an engine with these attributes."""

    def send(server: ConfigurableServer) -> Awaitable[ErrorResponse]:
        vars(server.engine).update(attributes)
        return case(server)

    return send


def raw(content: Any, headers: dict[str, str] = JSON_HEADERS, path: str = CHAT_PATH) -> Case:
    return lambda server: server.send("POST", path, content=content, headers=headers)


def request(method: str, path: str, **arguments: Any) -> Case:
    return lambda server: server.send(method, path, **arguments)


def list_models_with_api_keys(headers: dict[str, str]) -> Case:
    """GET /v1/models of a server that has API keys."""

    def send(server: ConfigurableServer) -> Awaitable[ErrorResponse]:
        server.configure(api_key_file=write_key_file(server))
        return server.send("GET", "/v1/models", headers=headers)

    return send


def write_key_file(server: ConfigurableServer) -> Path:
    path = server.folder / "keys"
    path.write_text(API_KEY)
    path.chmod(0o600)
    return path


async def after_n_requests(
    server: ConfigurableServer, service: Service, n: int, send: Callable[[], Awaitable[ErrorResponse]]
) -> ErrorResponse:
    """Response to a request that arrives while n earlier requests run or wait."""
    server.engine.hangs = True
    earlier = [asyncio.ensure_future(send()) for _ in range(n)]
    while service.admission.running + service.admission.waiting < n:
        await asyncio.sleep(0.01)
    try:
        return await send()
    finally:
        for task in earlier:
            task.cancel()
        await asyncio.gather(*earlier, return_exceptions=True)


async def full_queue(server: ConfigurableServer) -> ErrorResponse:
    service = server.configure(max_running=1, max_waiting=2)
    return await after_n_requests(server, service, 3, lambda: chat()(server))


async def full_quota_of_key(server: ConfigurableServer) -> ErrorResponse:
    service = server.configure(api_key_file=write_key_file(server), max_per_key=2)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    body = {"model": NAME, "messages": QUESTION}
    return await after_n_requests(
        server, service, 2, lambda: server.send("POST", CHAT_PATH, json=body, headers=headers)
    )


async def waiting_timeout(server: ConfigurableServer) -> ErrorResponse:
    service = server.configure(max_running=1, waiting_timeout=0.1)
    async with service.admission.slots(1, None):
        return await chat()(server)


async def cancelled(server: ConfigurableServer) -> ErrorResponse:
    server.engine.finish_reason = "cancelled"
    return await chat()(server)


async def no_image_process(server: ConfigurableServer) -> ErrorResponse:
    """The image process runs /bin/false in place of Python."""
    original_sys = image_process.sys
    image_process.sys = SimpleNamespace(executable="/bin/false")  # type: ignore
    try:
        server.configure(max_images=3)  # settings of no other case, so that a new image process is started
        return await chat_with_image(data_url(png()))(server)
    finally:
        image_process.sys = original_sys


async def after_sigterm(server: ConfigurableServer) -> ErrorResponse:
    """At SIGTERM the server closes its slot queue."""
    # Settings of no other case that runs later: this app remains closed.
    server.configure(max_running=2).admission.close()
    return await chat()(server)


async def internal_error(server: ConfigurableServer) -> ErrorResponse:
    """Without its slot queue, the handler of the request raises an AttributeError."""
    service = server.configure(max_running=3)  # settings of no other case: this app remains without its queue
    service.admission = None  # type: ignore[assignment]
    return await chat()(server)


async def stalled_body(server: ConfigurableServer) -> ErrorResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(600)

    server.configure(body_timeout=0.1)
    return await server.send("POST", CHAT_PATH, content=chunks(), headers=JSON_HEADERS)


ENGINE_KILLED = EngineUnavailable(
    "the engine process was killed (SIGKILL), as the system does when memory runs out; a new one is being started, "
    "try again in a few seconds"
)
NOT_FINITE = QwenVLError(line_of(NotFiniteError()))  # the front receives the line from the engine process

CASES: dict[str, Case] = {
    # The request as such
    "an unknown path": request("POST", "/v1/embeddings", json={}),
    "`GET` where only `POST` is": request("GET", CHAT_PATH),
    "no `Content-Type`": raw(b"{}", {}),
    "`Content-Type: text/plain`": raw(b"{}", {"Content-Type": "text/plain"}),
    "`Content-Encoding: gzip`": raw(zlib.compress(b"{}"), {**JSON_HEADERS, "Content-Encoding": "gzip"}),
    "more than `max_body_bytes`": with_settings(raw(b" " * 2000), max_body_bytes=1024),
    "a body that does not come within `body_timeout`": stalled_body,
    "a body that is not JSON": raw(b"{"),
    "no body": raw(b""),
    "a body that is a list": raw(b"[]"),
    "no API key": list_models_with_api_keys({}),
    "an API key that is not in the file": list_models_with_api_keys({"Authorization": "Bearer other"}),
    "the header `Host` of another machine": request("GET", "/v1/models", headers={"Host": "example.org"}),
    "`POST` from another web page": raw(b"{}", {**JSON_HEADERS, "Origin": "https://example.org"}),
    # The model
    "another model": chat(model="gpt-4o"),
    "no `model`": chat(model=...),
    "`GET /v1/models/…` of another model": request("GET", "/v1/models/gpt-4o"),
    "a chat with the base model": with_settings(chat(), is_chat=False),
    # Messages
    "no `messages`": chat(messages=...),
    "empty `messages`": chat(messages=[]),
    "`messages` is text": chat(messages="hello"),
    "a message without a role": chat(messages=[{"content": "?"}]),
    "a message of a tool": chat(messages=[{"role": "tool", "content": "?"}]),
    "a message without content": chat(messages=[{"role": "user"}]),
    "a message whose content is null": chat(messages=[{"role": "user", "content": None}]),
    "a part of an unknown type": chat(messages=user_messages({"type": "input_audio"})),
    "a part without text": chat(messages=user_messages({"type": "text"})),
    "an `image_url` that is text": chat(
        messages=user_messages({"type": "image_url", "image_url": "data:,x"})
    ),
    "an image of the assistant": chat(
        messages=[*QUESTION, {**ASSISTANT_MESSAGE, "content": [image_part(data_url(png()))]}, *QUESTION]
    ),
    "a system message in the middle": chat(
        messages=[*QUESTION, ASSISTANT_MESSAGE, SYSTEM_MESSAGE, *QUESTION]
    ),
    "the first message is the assistant's": chat(messages=[ASSISTANT_MESSAGE, *QUESTION]),
    "the last message is the assistant's": chat(messages=[*QUESTION, ASSISTANT_MESSAGE]),
    "an earlier answer with `tool_calls`": chat(
        messages=[*QUESTION, {**ASSISTANT_MESSAGE, "tool_calls": [1]}, *QUESTION]
    ),
    "text with the tag of an image": chat(messages=[{"role": "user", "content": "<img>a.png</img>"}]),
    "a prompt beyond the context": chat(messages=[{"role": "user", "content": "a b c d e " * 4000}]),
    "a prompt beyond `max_prompt_tokens`": with_settings(
        chat(messages=[{"role": "user", "content": "a b c d e " * 20}]), max_prompt_tokens=50
    ),
    # Images
    "more than `max_images`": with_settings(
        chat(messages=user_messages(image_part(data_url(png())), image_part(data_url(png())), TEXT_PART)),
        max_images=1,
    ),
    "a path": chat_with_image("/etc/passwd"),
    "a `file:` URL": chat_with_image("file:///etc/passwd"),
    "a `data:` URL that is not ASCII": chat_with_image("data:image/png,é"),
    "a `data:` URL without a comma": chat_with_image("data:image/png;base64"),
    "invalid base64": chat_with_image("data:image/png;base64,!!!!"),
    "an image without bytes": chat_with_image("data:image/png;base64,"),
    "bytes that are not an image": chat_with_image("data:image/png;base64,AAAA"),
    "an image that is cut short": chat_with_image(data_url(png((40, 40))[:-30])),
    "an image with more than `max_image_pixels`": with_settings(
        chat_with_image(data_url(png())), max_image_pixels=20
    ),
    "an image with more than `max_image_bytes`": with_settings(
        chat_with_image(data_url(bytes(70_000))), max_image_bytes=2**16
    ),
    "an image of a host that is not listed": chat_with_image("https://example.org/a.png"),
    "a host that is not listed, beside one that is": with_settings(
        chat_with_image("https://example.com/a.png"), image_hosts=["images.example.org"]
    ),
    "an invalid URL": chat_with_image("http://[::1/a.png"),
    "a listed host at an address that is not public": with_settings(
        chat_with_image("http://localhost:9/a.png"), image_hosts=["localhost"]
    ),
    # Parameters
    "an unknown parameter": chat(temprature=1),
    "`tools`": chat(tools=[{"type": "function"}]),
    "`response_format` of JSON": chat(response_format={"type": "json_object"}),
    "`logit_bias`": chat(logit_bias={"1": 2}),
    "`temperature` above 2": chat(temperature=3),
    "`temperature` as text": chat(temperature="1"),
    "`top_p` above 1": chat(top_p=1.5),
    "`top_k` below -1": chat(top_k=-2),
    "`presence_penalty` above 2": chat(presence_penalty=2.1),
    "`frequency_penalty` below -2": chat(frequency_penalty=-3),
    "`repetition_penalty` of 0": chat(repetition_penalty=0),
    "`seed` of 65 bits": chat(seed=2**64),
    "`max_tokens` of 0": chat(max_tokens=0),
    "`max_tokens` above `max_new_tokens`": chat(max_tokens=3000),
    "`max_tokens` and `max_completion_tokens`": chat(max_tokens=3, max_completion_tokens=4),
    "`min_tokens` above `max_tokens`": chat(min_tokens=9),
    "`n` of 0": chat(n=0),
    "`n` above `max_choices`": chat(n=9),
    "`n` above `max_running`": with_settings(chat(n=3), max_running=2),
    "five stop strings": chat(stop=["a", "b", "c", "d", "e"]),
    "an empty stop string": chat(stop=""),
    "`stream` as text": chat(stream="yes"),
    "`stream_options` without `stream`": chat(stream_options={"include_usage": True}),
    "`top_logprobs` without `logprobs`": chat(top_logprobs=3),
    "`top_logprobs` above 20": chat(logprobs=True, top_logprobs=21),
    # Completions and tokenize
    "an empty prompt": completion(prompt=""),
    "tokens among texts": completion(prompt=["a", 3]),
    "a token that is negative": completion(prompt=[1, -1]),
    "a control token": completion(prompt=[1, 681]),  # <|extra_2|> of the demo model
    "more prompts than `max_choices`": completion(prompt=["a"] * 9),
    "`echo`": completion(echo=True),
    "`suffix`": completion(suffix="x"),
    "`best_of` above 1": completion(best_of=3),
    "`logprobs` above 20": completion(logprobs=21),
    "`tokenize` of nothing": request("POST", TOKENIZE_PATH, json={}),
    "`tokenize` of a prompt and messages": request(
        "POST", TOKENIZE_PATH, json={"prompt": "a", "messages": QUESTION}
    ),
    # States
    "the queue is full": full_queue,
    "a key has `max_per_key` completions": full_quota_of_key,
    "no slot within `waiting_timeout`": waiting_timeout,
    "the engine is not ready": with_engine(
        chat(), submit_error=EngineUnavailable("the engine has not been started")
    ),
    "the engine dies": with_engine(chat(), error=ENGINE_KILLED),
    "the engine dies in the middle of a stream": with_engine(chat(stream=True), error=ENGINE_KILLED),
    "the engine cannot compute the request": with_engine(chat(), tokens=[], error=NOT_FINITE),
    "longer than `running_timeout`": with_settings(with_engine(chat(), hangs=True), running_timeout=0.2),
    "longer than `running_timeout`, in a stream": with_settings(
        with_engine(chat(stream=True), hangs=True), running_timeout=0.2
    ),
    "longer than `running_timeout`, while images are loaded": with_settings(
        chat_with_image(data_url(png())), running_timeout=1e-4
    ),
    "the server cancels a request": cancelled,
    "an image process that does not start": no_image_process,
    "after SIGTERM": after_sigterm,
    "an internal error": internal_error,
}
