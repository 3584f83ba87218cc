"""HTTP client of a server. Requests run in an event loop in a thread, so that each can be cancelled at any time."""

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
    invalid_response,
)

T = TypeVar("T")

# In seconds. A server may queue a request and compute the whole answer before it sends the first byte.
_TIMEOUT = httpx.Timeout(30, read=1200)
# In seconds, shorter than servers' keep-alive timeout: a request must not race with the closing of its connection.
_LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=2)

# In seconds. Retries while a server is busy: maximum of all waits together.
_MAX_RETRY_SECONDS = 600.0
# In seconds. The first wait without Retry-After, doubled for each further one; the maximum of each wait, with or
# without Retry-After.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Server:
    """Client of an OpenAI-compatible server. Run its coroutines with `start`."""

    def __init__(self, url: str, key: Optional[str]) -> None:
        """Start the event loop.

        Args:
            url: base URL; see check_url.
            key: API key, if the server requires one.
        """
        self.url = url
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=_LIMITS)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="server", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the event loop. Cancelling the future closes the connection of its request."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def get(self, path: str) -> dict[str, Any]:
        """Get the JSON object at a path. Raises as `post`, without retries."""
        return await self._json_response(self._client.build_request("GET", self.url + path))

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the JSON response; retry while the server is busy.

        Raises:
            RefusedError, RequestError: this request failed; others may succeed.
            BusyError: the server is busy, and the waits between retries would exceed ten minutes in total.
            QwenVLError: the server cannot be reached, the connection breaks, the API key is wrong, or the response is
                invalid.
        """
        waited, pause = 0.0, _FIRST_PAUSE
        while True:
            try:
                request = self._client.build_request("POST", self.url + path, json=body)
                return await self._json_response(request)
            except BusyError as error:
                seconds = min(pause if error.retry_after is None else error.retry_after, _LONGEST_PAUSE)
                if waited + seconds > _MAX_RETRY_SECONDS:
                    raise
            await asyncio.sleep(seconds)
            waited, pause = waited + seconds, 2 * pause

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a request with "stream": true. Raises as `post`, without retries.

        The end of the response without [DONE] is no error here: the caller checks that the answer is complete.
        """
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

    async def _json_response(self, request: httpx.Request) -> dict[str, Any]:
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
            raise invalid_response(self.url) from error
        if not isinstance(value, dict):
            raise invalid_response(self.url)
        return value


async def _data(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events; the data of an event is one line.

    httpx's `aiter_lines` would also split at characters that JSON strings may contain, such as U+2028.
    """
    incomplete_line = b""
    async for chunk in response.aiter_bytes():
        *lines, incomplete_line = (incomplete_line + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
