"""Service without a model: an engine that counts, a router with one path, and a server that uses them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Optional

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.admission import SlotQueue
from paddlemix_qwenvl_plugin.serve.app import create_app
from paddlemix_qwenvl_plugin.serve.engine_api import (
    Ended,
    EngineRequest,
    EngineStats,
    EngineUnavailable,
    Token,
)
from paddlemix_qwenvl_plugin.serve.listening import bound_socket, url_of
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.request_info import info_of
from paddlemix_qwenvl_plugin.serve.server import Server
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

PATH = "/v1/chat/completions"


class CountingStream:
    """TokenStream of the ids 0, 1, 2 …, each after a pause."""

    def __init__(self, engine: CountingEngine, n_tokens: int) -> None:
        self._engine = engine
        self._n_tokens = n_tokens
        self.cancelled = False
        self.ended: Optional[Ended] = None

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        for i in range(self._n_tokens):
            await asyncio.sleep(self._engine.pause)
            if self._engine.stopped:
                raise EngineUnavailable("the engine was stopped")
            yield [Token(i)]
        self.ended = Ended("length", 0)

    def cancel(self) -> None:
        self.cancelled = True


class CountingEngine:
    """EngineClient whose completions are the token ids 0, 1, 2 …, as many as the request allows.

    Attributes:
        start_error: exception of `start`, if any.
        streams: the streams of all requests so far.
    """

    def __init__(self, pause: float = 0.0, loading: float = 0.0, print_loading: bool = False) -> None:
        """Create the engine.

        Args:
            pause: seconds before each token.
            loading: duration of `start` in seconds.
            print_loading: whether `start` first prints "loading".
        """
        self.ready = False
        self.restarts = 0
        self.stats = EngineStats(
            blocks=100, blocks_used=7, prompt_tokens=50, cached_tokens=20, completion_tokens=30
        )
        self.pause = pause
        self.loading = loading
        self.print_loading = print_loading
        self.stopped = False
        self.start_error: Optional[Exception] = None
        self.streams: list[CountingStream] = []

    async def start(self) -> None:
        if self.print_loading:
            print("loading", flush=True)
        await asyncio.sleep(self.loading)
        if self.start_error is not None:
            raise self.start_error
        self.ready = True

    async def stop(self) -> None:
        self.ready, self.stopped = False, True

    def submit(self, request: EngineRequest) -> CountingStream:
        if not self.ready:
            raise EngineUnavailable("the engine is not ready")
        self.streams.append(CountingStream(self, request.options.max_new_tokens))
        return self.streams[-1]


class NoImages:
    """ImageLoader for requests without images."""

    async def load(self, url: str, param: str) -> Any:
        raise AssertionError

    async def close(self) -> None: ...


def fake_service(engine: Optional[CountingEngine] = None, **settings: Any) -> Service:
    """Service with a CountingEngine and these settings; the port is 0 (any free port) if it is not given."""
    values = ServeSettings(**{"port": 0, **settings})
    metrics = Metrics()
    queue = SlotQueue(
        values.max_running, values.max_waiting, values.waiting_timeout, values.max_per_key, metrics.queued
    )
    unused: Any = None
    return Service(
        values,
        engine or CountingEngine(),
        tokenizer=unused,
        config=unused,
        is_chat=True,
        model_name="counting",
        images=NoImages(),
        admission=queue,
        metrics=metrics,
    )


def fake_router(service: Service) -> APIRouter:
    """Router with only POST /v1/chat/completions, which streams the token ids of a completion as events.

    Without `stream` it returns the text of these events as `answer`.

    Fields of the body, all optional: `n_tokens`, `stream`, `n` (number of slots), `padding` (spaces in each event),
    `raise` (text of an exception).
    """
    router = APIRouter()

    @router.post(PATH)
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        if body.get("raise"):
            raise RuntimeError(f"requested: {body['raise']}")
        info = info_of(request.scope)
        options = GenerationOptions(max_new_tokens=body.get("n_tokens", 3))
        stack = contextlib.AsyncExitStack()
        await stack.enter_async_context(service.admission.slots(body.get("n", 1), info.key))

        async def events() -> AsyncIterator[str]:
            async with stack:
                n_tokens = 0
                try:
                    stream = service.engine.submit(EngineRequest([1], [], [], options))
                    async for tokens in stream:
                        n_tokens += len(tokens)
                        ids = json.dumps([token.id for token in tokens])
                        yield f"data: {ids}{' ' * body.get('padding', 0)}\n\n"
                    yield "data: [DONE]\n\n"
                except EngineUnavailable as error:
                    info.error = "engine_unavailable"
                    yield f"data: {json.dumps({'error': str(error)})}\n\n"
                finally:
                    info.prompt_tokens, info.completion_tokens = 1, n_tokens

        if body.get("stream"):
            return StreamingResponse(events(), media_type="text/event-stream")
        return JSONResponse({"answer": "".join([event async for event in events()])})

    return router


def fake_app(service: Service, **arguments: Any) -> FastAPI:
    return create_app(service, fake_router(service), **arguments)


@contextlib.contextmanager
def served(service: Service, **arguments: Any) -> Iterator[str]:
    """Serve a fake service on a free port, in a thread; the context is the URL."""
    listener = bound_socket(service.settings.host, 0, reuse_port=False)
    started = threading.Event()
    servers: list[Server] = []

    async def serve() -> None:
        await service.engine.start()
        servers.append(Server(service, fake_app(service, **arguments), listener))
        started.set()
        await servers[0].serve(sockets=[listener.socket])

    thread = threading.Thread(target=asyncio.run, args=[serve()], daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield url_of(listener.socket)
    finally:
        servers[0].should_exit = True
        thread.join(60)
        assert not thread.is_alive()
