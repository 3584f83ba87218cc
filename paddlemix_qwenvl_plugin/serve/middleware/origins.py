"""Web pages of elsewhere must not use a server that asks for no key."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.api_keys import is_loopback
from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::\d+)?")
_HARMLESS = ("GET", "HEAD", "OPTIONS")  # a page of elsewhere cannot read what they give


class OriginCheck:
    """Refuses what a browser sends in the name of another web page.

    A page can have the browser send a POST anywhere: its header Origin says which page. A page can also give its own
    name the address of this machine (DNS rebinding), and be of the same origin then: the header Host has that name.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], loopback_only: bool) -> None:
        """Args:
        allowed: origins of other pages that may ask.
        loopback_only: whether the server is for this machine only, and goes by its names.
        """
        self._app = app
        self._allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._problem(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await respond(error, scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self._loopback_only and not is_loopback(_name(host)):
            return ApiError(
                403,
                "Host: not a name of this machine; a server without API keys answers at localhost only",
                "permission_error",
                code="host_not_allowed",
            )
        origin = headers.get("origin", "").lower()
        if not origin or scope["method"] in _HARMLESS or self._allowed & {origin, "*"}:
            return None
        if urlsplit(origin).netloc == host and origin != "null":
            return None
        return ApiError(
            403,
            "Origin: this web page may not use the server; --cors_origins lists those that may",
            "permission_error",
            code="origin_not_allowed",
        )


def _name(host: str) -> str:
    """The header Host without its port; empty if it is none."""
    match = _HOST.fullmatch(host)
    return match[1] if match else ""
