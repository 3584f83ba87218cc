"""Protection of a server without API keys against web pages of other origins."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.api_keys import is_loopback
from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError

# Host name or IP address, an IPv6 address in brackets, with an optional port.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::\d+)?")
# Methods that change nothing; a page of another origin cannot read their responses.
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class OriginCheck:
    """Middleware that refuses requests of web pages of other origins.

    It checks two headers. Origin: a page can make the browser send a POST to any host, with the page's origin in this
    header. Host: a page can resolve the name of its host to this machine (DNS rebinding), and then has the server's
    origin; this header contains the name.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str], loopback_only: bool) -> None:
        """Set the allowed origins and hosts.

        Args:
            allowed: origins of other pages that may use the server; "*" allows all.
            loopback_only: whether the header Host must be a loopback name or address; false with --no_auth.
        """
        self._app = app
        self._allowed = frozenset(origin.rstrip("/").lower() for origin in allowed)
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 403."""
        error = self._problem(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await respond(error, scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        """Error for a refused request, else None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self._loopback_only and not is_loopback(_host_name(host)):
            return ApiError(
                403,
                "Host: not a name of this machine; a server without API keys answers at localhost only",
                "permission_error",
                code="host_not_allowed",
            )
        origin = headers.get("origin", "").lower()
        if not origin or scope["method"] in _SAFE_METHODS or self._allowed & {origin, "*"}:
            return None
        # "null", the origin of a sandboxed page, has an empty host and must not equal an empty header Host.
        if urlsplit(origin).netloc == host and origin != "null":
            return None
        return ApiError(
            403,
            "Origin: this web page may not use the server; --cors_origins lists those that may",
            "permission_error",
            code="origin_not_allowed",
        )


def _host_name(host: str) -> str:
    """Host name of the header Host, without the port; empty if invalid."""
    match = _HOST.fullmatch(host)
    return match[1] if match else ""
