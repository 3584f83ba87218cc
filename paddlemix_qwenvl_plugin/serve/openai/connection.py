"""Responses that are cancelled when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import api_error
from paddlemix_qwenvl_plugin.serve.errors import ClientGone
from paddlemix_qwenvl_plugin.serve.openai.json_text import dumps, event
from paddlemix_qwenvl_plugin.serve.request_info import info_of
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

T = TypeVar("T")


async def while_connected(receive: Receive, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine; cancel it when the client disconnects or the caller is cancelled.

    Raises:
        ClientGone: the client disconnected before the coroutine ended.
    """
    task = asyncio.ensure_future(coroutine)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        disconnect.cancel()
        task.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


class EventStream(StreamingResponse):
    """Response of server-sent events.

    An error before the first event becomes an error response with its HTTP status; a later QwenVLError is sent as the
    last event. `events` is closed at the end of the response, also when the client disconnects.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        """Create the response; `events` yields the data of each event."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx must not buffer the events
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until their end or the client's disconnect."""
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
            response = api_error(error)
            info_of(scope).error = response.code or response.kind
            body = event(dumps(response.body()))
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
