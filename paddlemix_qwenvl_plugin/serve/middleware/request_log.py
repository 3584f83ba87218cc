"""Request ids, the request log, metrics, and a response to unexpected exceptions."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.error_response import api_error, respond
from paddlemix_qwenvl_plugin.serve.json_log import LOGGER, log
from paddlemix_qwenvl_plugin.serve.request_info import RequestInfo, info_of
from paddlemix_qwenvl_plugin.serve.service import Service

_VALID_ID = re.compile(r"[\w.:+/=-]{1,100}", re.ASCII)
_MAX_PATH = 200
# Monitoring requests these paths every few seconds: they are logged at level debug.
_POLLED_PATHS = ("/health/live", "/health/ready", "/metrics")
# nginx's status for a client that disconnected before the response began.
_CLIENT_CLOSED_REQUEST = 499


class RequestLog:
    """Middleware that assigns the request id and logs and counts each request; only SecurityHeaders is further out."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """Set the known paths.

        Args:
            paths: routes of the application. They are values of the metrics' label `path`, which is "other" for all
                other paths: clients must not create time series.
        """
        self._app = app
        self._service = service
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; respond with 500 to an unexpected exception."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        info = info_of(scope)
        client_id = Headers(scope=scope).get("x-request-id", "")
        if _VALID_ID.fullmatch(client_id):
            info.id = client_id
        status = _CLIENT_CLOSED_REQUEST  # until the response begins
        disconnected = True  # until the response ends

        async def observe(message: Message) -> None:
            nonlocal status, disconnected
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = info.id
                if self._service.draining:  # the client must open a new connection, to a new server
                    headers["Connection"] = "close"
            else:
                disconnected = message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except Exception as error:
            LOGGER.exception("exception in a request", extra={"qwenvl_fields": {"id": info.id}})
            if status == _CLIENT_CLOSED_REQUEST:  # no response has begun
                await respond(api_error(error), scope, receive, observe)
            else:  # uvicorn closes the connection, since the response is incomplete
                info.error = info.error or "internal_error"
                disconnected = False
        finally:
            self._record(scope, info, status, disconnected)

    def _record(self, scope: Scope, info: RequestInfo, status: int, disconnected: bool) -> None:
        """Count and log a request that has ended; `disconnected`: whether the client left before the end."""
        seconds = time.monotonic() - info.begin
        path = scope["path"]
        self._service.metrics.request(path if path in self._paths else "other", status, seconds)
        if info.error is not None:
            self._service.metrics.error(info.error)
        fields = {
            "id": info.id,
            "method": scope["method"],
            "path": path[:_MAX_PATH],
            "status": status,
            "seconds": round(seconds, 4),
            "prompt_tokens": info.prompt_tokens,
            "completion_tokens": info.completion_tokens,
            "cached_tokens": info.cached_tokens,
            "prompts": info.prompts,
            "completions": info.completions,
            "key": info.key,
            "error": info.error,
            "client_disconnected": disconnected or None,
        }
        level = logging.DEBUG if path in _POLLED_PATHS else logging.INFO
        log(level, "request", **{name: value for name, value in fields.items() if value is not None})
