"""Errors of the HTTP API as OpenAI error objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, one_line


class ClientGone(Exception):
    """The client has disconnected."""


class ApiError(QwenVLError):
    """Error response: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: Optional[str] = None,
        code: Optional[str] = None,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        """Create an error response.

        Args:
            kind: OpenAI's `type`: invalid_request_error, authentication_error, rate_limit_error, server_error …
            param: the invalid parameter, such as `messages[0].content`.
            code: machine-readable code, such as `context_length_exceeded`.
        """
        super().__init__(message)
        # The attributes are named as the arguments: cluster/serve/coordinator.py sends them to a front, which creates
        # the error from them.
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        # `param` may quote the request; a lone surrogate cannot be encoded as UTF-8.
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        message = one_line(str(self))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}
