"""Per-request record for logs, limits and metrics."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Optional
from uuid import uuid4

# Key of the RequestInfo in the state of an ASGI scope.
_STATE_KEY = "info"


@dataclass
class RequestInfo:
    """Record of a request, filled in by middleware and handlers; available as `info_of(scope)`.

    Attributes:
        id: value of the response's header X-Request-Id.
        begin: time at which the request's headers had been read (time.monotonic).
        key: short hash of the request's API key; None without a valid key.
        prompt_tokens, completion_tokens, cached_tokens: the request's token counts, as in the properties of Completion
            (openai/completion.py); None without a completion.
        prompts, completions: texts of all prompts and choices, if `log_prompts` is set.
        error: code of the error response or error event, or its type if it has no code; None: no error.
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
    info: RequestInfo = scope.setdefault("state", {}).setdefault(_STATE_KEY, RequestInfo())
    return info
