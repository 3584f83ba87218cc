"""Per-request record for logs, limits and metrics."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Optional
from uuid import uuid4

_STATE = "info"


@dataclass
class RequestInfo:
    """Record of a request, filled in by middleware and handlers; available as `info_of(scope)`.

    Attributes:
        id: value of the header X-Request-Id.
        begin: time at which its headers had been read (time.monotonic).
        key: short hash of its API key; None if the server requires no keys.
        prompt_tokens, completion_tokens, cached_tokens: usage of all choices.
        prompts, completions: texts of all choices, if `log_prompts` is set.
        error: code of the error response or of the stream's error event; its type without a code.
    """

    id: str = field(default_factory=lambda: uuid4().hex)
    begin: float = field(default_factory=monotonic)
    key: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    prompts: Optional[list[str]] = None
    completions: Optional[list[str]] = None
    error: Optional[str] = None


def info_of(scope: MutableMapping[str, Any]) -> RequestInfo:
    """Return the RequestInfo of an ASGI scope; create it on first use."""
    info: RequestInfo = scope.setdefault("state", {}).setdefault(_STATE, RequestInfo())
    return info
