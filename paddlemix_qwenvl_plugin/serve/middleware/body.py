"""The body of a request: of bounded size, in bounded time, JSON."""

from __future__ import annotations

import asyncio
from typing import Optional

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "DELETE")
# A client that is still sending when it is answered may not see the answer: a connection with unread bytes is reset.
_CLOSE = {"Connection": "close"}


class ClientLeft(Exception):
    """The connection ended within the body."""


class BodyLimit:
    """Reads the body of a request before anybody else sees the request, and hands it on in one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        """
        Args:
            max_bytes: of a body; of a longer one as much again is read and thrown away, so that its client, which is
                still sending, sees the answer.
            timeout: seconds to receive a body.
        """
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self._timeout)
            problem = _problem(headers)
            if problem is not None:
                raise problem
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

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body.

        Raises:
            ApiError: it is too long.
            ClientLeft: it ended too early.
        """
        announced = headers.get("content-length", "")
        if headers.get("expect") and announced.isdigit() and int(announced) > self._max_bytes:
            raise self._too_long()  # the client waits for our word before it sends
        pieces: list[bytes] = []
        size = 0
        more = True
        while more and size <= 2 * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            size += len(message.get("body", b""))
            if size <= self._max_bytes:
                pieces.append(message.get("body", b""))
            else:
                pieces.clear()
            more = message.get("more_body", False)
        if size > self._max_bytes:
            raise self._too_long()
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
