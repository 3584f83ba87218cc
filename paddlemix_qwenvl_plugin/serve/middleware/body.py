"""The body of a request: of bounded size, in bounded time, JSON that is soon parsed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Optional

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.middleware.json_size import check_size

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")
# A client that is still sending when it is answered may not see the answer: a connection with unread bytes is reset.
_CLOSE = {"Connection": "close"}


class ClientLeft(Exception):
    """The connection ended within the body."""


@dataclass
class _Held:
    """How much of a request's body is in memory."""

    n_bytes: int = 0


class BodyLimit:
    """Reads the body of a request before anybody else sees the request, and hands it on in one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_held_bytes: int, timeout: float) -> None:
        """Args:
        max_bytes: of a body; of a longer one as much again is read and thrown away, so that its client, which is
            still sending, sees the answer.
        max_held_bytes: of the bodies of all requests that have not been answered.
        timeout: seconds to receive a body.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._timeout = timeout
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        except ClientLeft:
            return
        except asyncio.TimeoutError:
            message = f"The request was not received within {self._timeout:g} s"
            await respond(ApiError(408, message, code="body_timeout", headers=_CLOSE), scope, receive, send)
            return
        except ApiError as error:
            await respond(error, scope, receive, send)
            return
        whole: Optional[Message] = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()  # http.disconnect, once the client goes away
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _read(self, held: _Held, headers: Headers, receive: Receive) -> bytes:
        """The body, which counts as held from its first bytes on.

        Raises:
            ApiError: it is too long, or there is no room for it now.
            ClientLeft: it ended too early.
        """
        announced = headers.get("content-length", "")
        if headers.get("expect") and announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_long()  # the client waits for our word before it sends
        pieces: list[bytes] = []
        size, full = 0, False
        more = True
        while more and size <= 2 * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            piece = message.get("body", b"")
            size += len(piece)
            full = full or self._held_bytes + len(piece) > self._max_held_bytes
            if full or size > self._max_bytes:
                pieces.clear()
                n_bytes = 0
            else:
                pieces.append(piece)
                n_bytes = size
            self._held_bytes += n_bytes - held.n_bytes
            held.n_bytes = n_bytes
            more = message.get("more_body", False)
        if size > self._max_bytes:
            raise self._too_long()
        if full:
            raise ApiError(
                429,
                "The requests that wait take all the memory that this server gives them; try again later",
                "rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        return b"".join(pieces)

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"The request has more than {self._max_bytes} bytes, the most that this server takes",
            code="request_too_large",
            headers=_CLOSE,
        )


def _problem(headers: Headers) -> Optional[ApiError]:
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        said = f"not {content_type}" if content_type else "which is missing"
        return ApiError(415, f"Content-Type: must be application/json, {said}", code="unsupported_media_type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        return ApiError(
            415, "Content-Encoding: send the body as it is, without one", code="unsupported_media_type"
        )
    return None
