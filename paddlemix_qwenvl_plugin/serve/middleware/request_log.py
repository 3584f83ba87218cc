"""A request's id, its line in the log, its place in the metrics, and an answer whatever happens."""

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

_SANE_ID = re.compile(r"[\w.:+/=-]{1,100}", re.ASCII)
_LONGEST_PATH = 200
# Asked for every few seconds by machines.
_QUIET = ("/health/live", "/health/ready", "/metrics")
# What a client that left before the answer began is counted as, after nginx.
_CLIENT_LEFT = 499


class RequestLog:
    """The outermost middleware."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str]) -> None:
        """Args:
        paths: the routes, which metrics tell apart; other paths are one.
        """
        self._app = app
        self._service = service
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        info = info_of(scope)
        given = Headers(scope=scope).get("x-request-id", "")
        if _SANE_ID.fullmatch(given):
            info.id = given
        status, complete = _CLIENT_LEFT, False

        async def note(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = info.id
                if self._service.draining:  # the client's next request goes to another server
                    headers["Connection"] = "close"
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            LOGGER.exception("exception in a request", extra={"qwenvl_fields": {"id": info.id}})
            if status == _CLIENT_LEFT:
                await respond(api_error(error), scope, receive, note)
            else:  # the answer is begun: uvicorn cuts the connection when it sees no end of it
                info.error = info.error or "internal_error"
        finally:
            self._done(scope, info, status, complete)

    def _done(self, scope: Scope, info: RequestInfo, status: int, complete: bool) -> None:
        seconds = time.monotonic() - info.begin
        path = scope["path"]
        self._service.metrics.request(path if path in self._paths else "other", status, seconds)
        if info.error is not None:
            self._service.metrics.error(info.error)
        fields = {
            "id": info.id,
            "method": scope["method"],
            "path": path[:_LONGEST_PATH],
            "status": status,
            "seconds": round(seconds, 4),
            "prompt_tokens": info.prompt_tokens,
            "completion_tokens": info.completion_tokens,
            "cached_tokens": info.cached_tokens,
            "prompts": info.prompts,
            "completions": info.completions,
            "key": info.key,
            "error": info.error,
            "client_left": True if not complete else None,
        }
        level = logging.DEBUG if path in _QUIET else logging.INFO
        log(level, "request", **{name: value for name, value in fields.items() if value is not None})
