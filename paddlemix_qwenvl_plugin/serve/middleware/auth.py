"""Authentication by API key, on a server with keys; a server without keys has OriginCheck (origins.py) instead."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve.api_keys import ApiKeys
from paddlemix_qwenvl_plugin.serve.error_response import respond
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.request_info import info_of


class Auth:
    """Middleware that admits requests with a known API key, and all requests for `open_paths`: page and health."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 401."""
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else ""  # other schemes carry no API key
        key_hash = self._keys.short_hash(key.encode("latin-1")) if key else None
        if key_hash is None:
            message = "Incorrect API key" if key else "No API key: send the header Authorization: Bearer KEY"
            error = ApiError(
                401,
                message,
                "authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await respond(error, scope, receive, send)
            return
        info_of(scope).key = key_hash
        await self._app(scope, receive, send)
