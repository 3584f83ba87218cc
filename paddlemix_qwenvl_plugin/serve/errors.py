"""Errors of the HTTP interface, in the form of OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, one_line


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
        """Args:
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
        # A message may name what a request brings. JSON takes any name but half surrogate pairs.
        param = None if self.param is None else self.param.encode("utf-8", "replace").decode()
        message = one_line(str(self))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}
