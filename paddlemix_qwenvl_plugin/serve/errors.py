"""Errors of the HTTP interface, in the form of OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.serve.engine_api import EngineUnavailable
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError


class ApiError(QwenVLError):
    """An answer that is an error: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: Optional[str] = None,
        code: Optional[str] = None,
        headers: Optional[Mapping[str, str]] = None,
    ) -> None:
        """
        Args:
            kind: OpenAI's `type`: invalid_request_error, authentication_error, rate_limit_error, server_error …
            param: the parameter at fault, as `messages[0].content`.
            code: a word that programs go by, as `context_length_exceeded`.
        """
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def as_api_error(error: QwenVLError) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineUnavailable):
        # A new engine is there within seconds.
        return ApiError(
            503, str(error), "server_error", code="engine_unavailable", headers={"Retry-After": "2"}
        )
    if isinstance(error, UsageError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, str(error), "server_error", code="engine_error")
