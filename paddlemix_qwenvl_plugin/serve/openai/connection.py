"""Work for a client that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import api_error
from paddlemix_qwenvl_plugin.serve.openai.json_text import dumps, event
from paddlemix_qwenvl_plugin.serve.request_info import info_of
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away or when this is cancelled.

    Raises:
        ClientGone: it went away.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events. The status is sent with the first event: an error before it is an error response.

    An error later is an event of its own, the last one. When the client goes away, `events` is closed.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        """`events` are the data of each event."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(receive, self._send_all(scope, send))

    async def _send_all(self, scope: Scope, send: Send) -> None:
        started = False
        try:
            async for data in self._events:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event(data), "more_body": True})
        except QwenVLError as error:
            if not started:
                raise
            told = api_error(error)
            info_of(scope).error = told.code or told.kind
            await send({"type": "http.response.body", "body": event(dumps(told.body())), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
