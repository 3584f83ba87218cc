"""Limits on request bodies: size, receiving time, memory for all bodies, parsing cost."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Optional

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError, ClientGone
from paddlemix_qwenvl_plugin.serve.middleware.json_size import check_size

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")
# For responses to a request whose body may not have been read to its end: the connection takes no other request.
_CLOSE = {"Connection": "close"}


@dataclass
class _Held:
    """Number of a request's body bytes in memory."""

    n_bytes: int = 0


class BodyLimit:
    """Middleware that reads the whole body within its limits before it passes the request on."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_held_bytes: int, timeout: float) -> None:
        """Set the limits.

        Args:
            max_bytes: maximum size of a body. A longer body is read up to twice this size and discarded: a connection
                closed with unread bytes is reset, and the client may not see the response.
            max_held_bytes: maximum total size of the bodies of all unanswered requests.
            timeout: timeout for receiving a body, in seconds.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._timeout = timeout
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body and pass the request on, or respond with an error."""
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        held = _Held()
        try:
            await self._handle(held, scope, receive, send)
        finally:
            self._held_bytes -= held.n_bytes

    async def _handle(self, held: _Held, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            body = await asyncio.wait_for(self._read(held, headers, receive), self._timeout)
            problem = _problem(headers)
            if problem is not None:
                raise problem
            check_size(body)
        except ClientGone:
            return
        except asyncio.TimeoutError:
            message = f"The request was not received within {self._timeout:g} s"
            await respond(ApiError(408, message, code="body_timeout", headers=_CLOSE), scope, receive, send)
            return
        except ApiError as error:
            await respond(error, scope, receive, send)
            return
        body_message: Optional[Message] = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            """Return the whole body in the first call; then wait for the client's disconnect."""
            nonlocal body_message
            if body_message is None:
                return await receive()
            message, body_message = body_message, None
            return message

        await self._app(scope, replay, send)

    async def _read(self, held: _Held, headers: Headers, receive: Receive) -> bytes:
        """Read the body and count its bytes in `held`; a body over a limit is read further but not kept.

        Raises:
            ApiError: the body is too long (413), or the memory for bodies is in use (429).
            ClientGone: the client disconnected before the end of the body.
        """
        content_length = headers.get("content-length", "")
        if headers.get("expect") and content_length.isdigit() and int(content_length) > self._max_bytes:
            raise self._too_long()  # the client waits for 100 Continue and has not sent the body
        chunks: list[bytes] = []
        size, memory_full = 0, False
        more_body = True
        while more_body and size <= 2 * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            memory_full = memory_full or self._held_bytes + len(chunk) > self._max_held_bytes
            if memory_full or size > self._max_bytes:
                chunks.clear()
                n_bytes = 0
            else:
                chunks.append(chunk)
                n_bytes = size
            self._held_bytes += n_bytes - held.n_bytes
            held.n_bytes = n_bytes
            more_body = message.get("more_body", False)
        if size > self._max_bytes:
            raise self._too_long()
        if memory_full:
            raise ApiError(
                429,
                "The memory for waiting requests is full; try again later",
                "rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        return b"".join(chunks)

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"The request's body exceeds the server's limit of {self._max_bytes} bytes",
            code="request_too_large",
            headers=_CLOSE,
        )


def _problem(headers: Headers) -> Optional[ApiError]:
    """Error for a body that is not declared as uncompressed JSON, else None."""
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        found = f"not {content_type}" if content_type else "which is missing"
        return ApiError(
            415, f"Content-Type: must be application/json, {found}", code="unsupported_media_type"
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        return ApiError(
            415, "Content-Encoding: not supported; send the body uncompressed", code="unsupported_media_type"
        )
    return None
