"""The connection to a server: requests run in an event loop of its own, so that each can be cancelled at any time."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from typing import Any, Optional, TypeVar

import httpx

from paddlemix_qwenvl_plugin.remote.errors import (
    BusyError,
    error_of_connection,
    error_of_event,
    error_of_response,
    no_openai_form,
)

T = TypeVar("T")

# A server may keep a request waiting, and then compute a whole answer, before it sends the first byte.
_TIMEOUT = httpx.Timeout(30, read=1200)
# Shorter than servers keep an idle connection: a request must not meet the end of one.
_LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2)

# How long a busy server is asked again, and for how long it is left alone each time if it does not say.
_PATIENCE_SECONDS = 600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Server:
    """A server in OpenAI's form. Coroutines of this class run in its event loop: see `start`."""

    def __init__(self, url: str, key: Optional[str]) -> None:
        """Args:
        url: see check_url.
        key: the API key, if it wants one.
        """
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=_LIMITS)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="server", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the event loop; to cancel the future ends its connection."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path. Errors as for `post`."""
        return await self._whole(self._client.build_request("GET", self.url + path))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to a request.

        Raises:
            RefusedError, RequestError: of this request; others may be answered.
            BusyError: the server is still busy after ten minutes.
            QwenVLError: there is no such server, or its key is another one.
        """
        waited, pause = 0.0, _FIRST_PAUSE
        while True:
            try:
                return await self._whole(self._client.build_request("POST", self.url + path, json=body))
            except BusyError as error:
                seconds = min(pause if error.retry_after is None else error.retry_after, _LONGEST_PAUSE)
                if waited + seconds > _PATIENCE_SECONDS:
                    raise
            await asyncio.sleep(seconds)
            waited, pause = waited + seconds, 2 * pause

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The events of a request with "stream": true. Errors as for `post`, but a busy server is asked once."""
        try:
            async with self._client.stream("POST", self.url + path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise error_of_response(self.url, response)
                async for data in _data(response):
                    if data == b"[DONE]":
                        return
                    event = self._object(data)
                    if "error" in event:
                        raise error_of_event(self.url, event["error"])
                    yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise error_of_connection(self.url, error) from error

    async def _whole(self, request: httpx.Request) -> dict[str, Any]:
        try:
            response = await self._client.send(request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise error_of_connection(self.url, error) from error
        if response.status_code != 200:
            raise error_of_response(self.url, response)
        return self._object(response.content)

    def _object(self, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise no_openai_form(self.url) from error
        if not isinstance(value, dict):
            raise no_openai_form(self.url)
        return value


async def _data(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, of which each is one line.

    Not `aiter_lines`, which also ends a line at characters that JSON may hold, such as U+2028.
    """
    held = b""
    async for chunk in response.aiter_bytes():
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
