"""Cases of the server's tables in docs/errors.md: a row's `request` to the function that sends it."""

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
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

NAME = "qwen-vl-chat"
CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/tokenize"
KEY = "a-key"


class Got(NamedTuple):
    """Response: status, error object, headers."""

    status: int
    error: dict[str, Any]
    headers: httpx.Headers


class Engine:
    """EngineClient that generates a few scripted tokens and then fails as configured."""

    def __init__(self) -> None:
        self.ready = True
        self.restarts = 0
        self.stats = EngineStats()
        self.tokens: list[int] = []
        self.then: Optional[Exception] = None
        self.refuses: Optional[Exception] = None
        self.hangs = False
        self.ends_with: Literal["length", "cancelled"] = "length"

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def submit(self, request: EngineRequest) -> Stream:
        if self.refuses is not None:
            raise self.refuses
        return Stream(self)


class Stream:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cancelled = asyncio.Event()
        self.ended: Optional[Ended] = None

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        for token in self._engine.tokens:
            yield [Token(token)]
        if self._engine.then is not None:
            raise self._engine.then
        if self._engine.hangs:
            await self._cancelled.wait()
            self.ended = Ended("cancelled", 0)
        else:
            self.ended = Ended(self._engine.ends_with, 0)

    def cancel(self) -> None:
        self._cancelled.set()


class Bench:
    """The real app, with image processes, queue and tokenizer, around the engine above; bound to one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine()
        self._config = load_config(MODEL)
        self._tokenizer = QwenTokenizer.of_model(MODEL, self._config)
        self.some_tokens = self._tokenizer.encode("a b c")
        self._made: dict[str, tuple[Service, Any]] = {}
        self._chosen: dict[str, Any] = {}

    def configure(self, is_chat: bool = True, **settings: Any) -> Service:
        """Use a server with these settings for the next requests."""
        self._chosen = {"is_chat": is_chat, **settings}
        return self._server()[0]

    def reset(self) -> None:
        self._chosen = {}
        vars(self.engine).update(vars(Engine()))
        self.engine.tokens = self.some_tokens

    async def close(self) -> None:
        for service, _ in self._made.values():
            await service.images.close()

    async def send(self, method: str, path: str, **request: Any) -> Got:
        """Send a request and return the error of the response, which may be the last event of a stream."""
        transport = httpx.ASGITransport(self._server()[1])
        base = "http://127.0.0.1:8000"
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=60) as client:
            response = await client.request(method, path, **request)
        if response.headers["content-type"].startswith("text/event-stream"):
            *_, last = response.text.strip().split("\n\n")
            return Got(response.status_code, json.loads(last[len("data: ") :])["error"], response.headers)
        return Got(response.status_code, response.json()["error"], response.headers)

    def _server(self) -> tuple[Service, Any]:
        chosen = dict(self._chosen)
        key = repr(sorted(chosen.items()))
        if key not in self._made:
            is_chat = chosen.pop("is_chat", True)
            settings = ServeSettings(**{"image_workers": 1, "image_timeout": 60, **chosen})
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
            self._made[key] = service, create_app(service)
        return self._made[key]


Case = Callable[[Bench], Awaitable[Got]]


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


ASK = [{"role": "user", "content": "?"}]
SAID = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "a"}
PART = {"type": "text", "text": "?"}
JSON = {"Content-Type": "application/json"}


def changed(path: str, good: dict[str, Any], changes: dict[str, Any]) -> Case:
    """Valid body with these parameters; ... omits one."""
    body = {name: value for name, value in {**good, **changes}.items() if value is not ...}
    return lambda bench: bench.send("POST", path, json=body)


def chat(**changes: Any) -> Case:
    return changed(CHAT, {"model": NAME, "messages": ASK, "max_tokens": 4}, changes)


def text(**changes: Any) -> Case:
    return changed(TEXT, {"model": NAME, "prompt": "a", "max_tokens": 4}, changes)


def look_at(url: str) -> Case:
    return chat(messages=user(image(url), PART))


def png(size: tuple[int, int] = (6, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "#c86432").save(buffer, kind)
    return buffer.getvalue()


def data_url(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def within(case: Case, **settings: Any) -> Case:
    """Case at a server with these settings."""

    def send(bench: Bench) -> Awaitable[Got]:
        bench.configure(**settings)
        return case(bench)

    return send


def engine(case: Case, **state: Any) -> Case:
    """Case with an engine in this state."""

    def send(bench: Bench) -> Awaitable[Got]:
        vars(bench.engine).update(state)
        return case(bench)

    return send


def raw(content: Any, headers: dict[str, str] = JSON, path: str = CHAT) -> Case:
    return lambda bench: bench.send("POST", path, content=content, headers=headers)


def call(method: str, path: str, **request: Any) -> Case:
    return lambda bench: bench.send(method, path, **request)


def with_keys(headers: dict[str, str]) -> Case:
    def send(bench: Bench) -> Awaitable[Got]:
        bench.configure(api_key_file=key_file(bench))
        return bench.send("GET", "/v1/models", headers=headers)

    return send


def key_file(bench: Bench) -> Path:
    path = bench.folder / "keys"
    path.write_text(KEY)
    path.chmod(0o600)
    return path


async def with_others(bench: Bench, service: Service, n: int, request: Callable[[], Awaitable[Got]]) -> Got:
    """Response to a request that arrives while n slow ones are in the server."""
    bench.engine.hangs = True
    others = [asyncio.ensure_future(request()) for _ in range(n)]
    while service.admission.running + service.admission.waiting < n:
        await asyncio.sleep(0.01)
    try:
        return await request()
    finally:
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def full_queue(bench: Bench) -> Got:
    service = bench.configure(max_running=1, max_waiting=2)
    return await with_others(bench, service, 3, lambda: chat()(bench))


async def full_key(bench: Bench) -> Got:
    service = bench.configure(api_key_file=key_file(bench), max_per_key=2)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": NAME, "messages": ASK}
    return await with_others(bench, service, 2, lambda: bench.send("POST", CHAT, json=body, headers=headers))


async def long_wait(bench: Bench) -> Got:
    service = bench.configure(max_running=1, waiting_timeout=0.1)
    async with service.admission.slots(1, None):
        return await chat()(bench)


async def cancelled(bench: Bench) -> Got:
    bench.engine.ends_with = "cancelled"
    return await chat()(bench)


async def no_image_process(bench: Bench) -> Got:
    python, image_process.sys = image_process.sys, SimpleNamespace(executable="/bin/false")  # type: ignore
    try:
        bench.configure(max_images=3)
        return await look_at(data_url(png()))(bench)
    finally:
        image_process.sys = python


async def ending(bench: Bench) -> Got:
    bench.configure(max_running=2).admission.close()
    return await chat()(bench)


async def mistake(bench: Bench) -> Got:
    service = bench.configure(max_running=3)
    service.admission = None  # type: ignore[assignment]
    return await chat()(bench)


async def stalled(bench: Bench) -> Got:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(600)

    bench.configure(body_timeout=0.1)
    return await bench.send("POST", CHAT, content=chunks(), headers=JSON)


DIED = EngineUnavailable(
    "the engine process was killed (SIGKILL), as the system does when memory runs out; a new one is being started, "
    "try again in a few seconds"
)
DAMAGED = QwenVLError("the model gives no finite numbers; its weights are damaged or do not fit")

CASES: dict[str, Case] = {
    # The request as such
    "a path that is not there": call("POST", "/v1/embeddings", json={}),
    "`GET` where only `POST` is": call("GET", CHAT),
    "no `Content-Type`": raw(b"{}", {}),
    "`Content-Type: text/plain`": raw(b"{}", {"Content-Type": "text/plain"}),
    "`Content-Encoding: gzip`": raw(zlib.compress(b"{}"), {**JSON, "Content-Encoding": "gzip"}),
    "more than `max_body_bytes`": within(raw(b" " * 2000), max_body_bytes=1024),
    "a body that does not come within `body_timeout`": stalled,
    "a body that is no JSON": raw(b"{"),
    "no body": raw(b""),
    "a body that is a list": raw(b"[]"),
    "no API key": with_keys({}),
    "an API key that is not of the file": with_keys({"Authorization": "Bearer other"}),
    "the header `Host` of another machine": call("GET", "/v1/models", headers={"Host": "example.org"}),
    "`POST` from another web page": raw(b"{}", {**JSON, "Origin": "https://example.org"}),
    # The model
    "another model": chat(model="gpt-4o"),
    "no `model`": chat(model=...),
    "`GET /v1/models/…` of another model": call("GET", "/v1/models/gpt-4o"),
    "a chat with the base model": within(chat(), is_chat=False),
    # Messages
    "no `messages`": chat(messages=...),
    "empty `messages`": chat(messages=[]),
    "`messages` is text": chat(messages="hello"),
    "a message without a role": chat(messages=[{"content": "?"}]),
    "a message of a tool": chat(messages=[{"role": "tool", "content": "?"}]),
    "a message without content": chat(messages=[{"role": "user"}]),
    "a message whose content is null": chat(messages=[{"role": "user", "content": None}]),
    "a part of an unknown type": chat(messages=user({"type": "input_audio"})),
    "a part without text": chat(messages=user({"type": "text"})),
    "an `image_url` that is text": chat(messages=user({"type": "image_url", "image_url": "data:,x"})),
    "an image of the assistant": chat(messages=[*ASK, {**SAID, "content": [image(data_url(png()))]}, *ASK]),
    "a system message in the middle": chat(messages=[*ASK, SAID, SYSTEM, *ASK]),
    "the assistant begins": chat(messages=[SAID, *ASK]),
    "the assistant has the last word": chat(messages=[*ASK, SAID]),
    "an earlier answer with `tool_calls`": chat(messages=[*ASK, {**SAID, "tool_calls": [1]}, *ASK]),
    "text with the tag of an image": chat(messages=[{"role": "user", "content": "<img>a.png</img>"}]),
    "a prompt beyond the context": chat(messages=[{"role": "user", "content": "a b c d e " * 4000}]),
    "a prompt beyond `max_prompt_tokens`": within(
        chat(messages=[{"role": "user", "content": "a b c d e " * 20}]), max_prompt_tokens=50
    ),
    # Images
    "more than `max_images`": within(
        chat(messages=user(image(data_url(png())), image(data_url(png())), PART)), max_images=1
    ),
    "a path": look_at("/etc/passwd"),
    "a `file:` URL": look_at("file:///etc/passwd"),
    "a `data:` URL that is not ASCII": look_at("data:image/png,é"),
    "a `data:` URL without a comma": look_at("data:image/png;base64"),
    "base64 that is none": look_at("data:image/png;base64,!!!!"),
    "an image without bytes": look_at("data:image/png;base64,"),
    "bytes that are not an image": look_at("data:image/png;base64,AAAA"),
    "an image that is cut short": look_at(data_url(png((40, 40))[:-30])),
    "an image with more than `max_image_pixels`": within(look_at(data_url(png())), max_image_pixels=20),
    "an image with more than `max_image_bytes`": within(
        look_at(data_url(bytes(70_000))), max_image_bytes=2**16
    ),
    "an image of a host that is not listed": look_at("https://example.org/a.png"),
    "a host that is not listed, beside one that is": within(
        look_at("https://example.com/a.png"), image_hosts=["images.example.org"]
    ),
    "a URL that is none": look_at("http://[::1/a.png"),
    "a listed host at an address that is not public": within(
        look_at("http://localhost:9/a.png"), image_hosts=["localhost"]
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
    "`n` above `max_running`": within(chat(n=3), max_running=2),
    "five stop strings": chat(stop=["a", "b", "c", "d", "e"]),
    "an empty stop string": chat(stop=""),
    "`stream` as text": chat(stream="yes"),
    "`stream_options` without `stream`": chat(stream_options={"include_usage": True}),
    "`top_logprobs` without `logprobs`": chat(top_logprobs=3),
    "`top_logprobs` above 20": chat(logprobs=True, top_logprobs=21),
    # Completions and tokenize
    "an empty prompt": text(prompt=""),
    "tokens among texts": text(prompt=["a", 3]),
    "a token that is negative": text(prompt=[1, -1]),
    "a control token": text(prompt=[1, 681]),
    "more prompts than `max_choices`": text(prompt=["a"] * 9),
    "`echo`": text(echo=True),
    "`suffix`": text(suffix="x"),
    "`best_of` above 1": text(best_of=3),
    "`logprobs` above 20": text(logprobs=21),
    "`tokenize` of nothing": call("POST", TOKENS, json={}),
    "`tokenize` of a prompt and messages": call("POST", TOKENS, json={"prompt": "a", "messages": ASK}),
    # States
    "the queue is full": full_queue,
    "a key has `max_per_key` requests": full_key,
    "no slot within `waiting_timeout`": long_wait,
    "the engine is not ready": engine(chat(), refuses=EngineUnavailable("the engine has not been started")),
    "the engine dies": engine(chat(), then=DIED),
    "the engine dies in the middle of a stream": engine(chat(stream=True), then=DIED),
    "the engine cannot compute the request": engine(chat(), tokens=[], then=DAMAGED),
    "longer than `running_timeout`": within(engine(chat(), hangs=True), running_timeout=0.2),
    "longer than `running_timeout`, in a stream": within(
        engine(chat(stream=True), hangs=True), running_timeout=0.2
    ),
    "the server ends a request": cancelled,
    "an image process that does not start": no_image_process,
    "after SIGTERM": ending,
    "a mistake of the server": mistake,
}
