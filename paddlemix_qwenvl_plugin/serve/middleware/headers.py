"""Security headers for browsers."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_COMMON_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
# The page loads all resources from this server; a user's images are data: and blob: URLs.
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"


class SecurityHeaders:
    """Outermost middleware: adds security headers to every response.

    Being outside of RequestLog, it also covers the 500 that RequestLog sends after an unexpected exception.
    """

    def __init__(self, app: ASGIApp, page_paths: frozenset[str]) -> None:
        self._app = app
        self._page_paths = page_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and add the headers to its response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_page = scope["path"] in self._page_paths
        policy = _PAGE_POLICY if is_page else _API_POLICY

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _COMMON_HEADERS.items():
                    headers[name] = value
                headers["Content-Security-Policy"] = policy
                if is_page:  # revalidate each file: modules of different versions are incompatible
                    headers["Cache-Control"] = "no-cache"
            await send(message)

        await self._app(scope, receive, with_headers)
