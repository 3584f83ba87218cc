"""GET /v1/models, and checks of a request's model."""

from __future__ import annotations

import time

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.responses import ModelEntry
from paddlemix_qwenvl_plugin.serve.service import Service

_STARTED = int(time.time())


def model_entry(service: Service) -> ModelEntry:
    """Return the entry of /v1/models; `created` is the start time of the server."""
    return ModelEntry(id=service.model_name, created=_STARTED, owned_by="paddlemix-qwenvl-plugin")


def check_model(service: Service, name: str) -> None:
    """Raise ApiError unless `name` is the served model."""
    if name != service.model_name:
        shown = name if len(name) <= 100 else name[:99] + "…"
        raise ApiError(
            404,
            f"The model `{shown}` does not exist; this server has `{service.model_name}`.",
            param="model",
            code="model_not_found",
        )


def check_is_chat(service: Service) -> None:
    """Raise ApiError if the served model is a base model, which does not support chat."""
    if not service.is_chat:
        raise ApiError(
            400,
            f"model: `{service.model_name}` is not a chat model; use /v1/completions",
            param="model",
            code="unsupported_value",
        )
