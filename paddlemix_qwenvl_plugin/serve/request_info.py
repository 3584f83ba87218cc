"""What is known of a request, from its first middleware to its line in the log."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Optional
from uuid import uuid4

_STATE = "info"


@dataclass
class RequestInfo:
    """Filled in by whoever comes to know it; handlers find it as `request.state.info`, or by `info_of(scope)`.

    Attributes:
        id: the header X-Request-Id.
        begin: when its head was read, on the clock of time.monotonic.
        key: short hash of its API key; None where no keys are demanded.
        prompt_tokens, completion_tokens, cached_tokens: its usage, of all its choices.
        error: code of the error that it was answered with, or its type; also that of an error event in a stream.
    """

    id: str = field(default_factory=lambda: uuid4().hex)
    begin: float = field(default_factory=monotonic)
    key: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    error: Optional[str] = None


def info_of(scope: MutableMapping[str, Any]) -> RequestInfo:
    """The info of an ASGI scope, made if it has none."""
    info: RequestInfo = scope.setdefault("state", {}).setdefault(_STATE, RequestInfo())
    return info
