"""GET /v1/models, and checks of a request's model."""

from __future__ import annotations

import time
from typing import Optional

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.responses import ModelEntry
from paddlemix_qwenvl_plugin.serve.service import Service

_START_TIME = int(time.time())


def model_entries(service: Service) -> list[ModelEntry]:
    """Entries of /v1/models: the model, then its adapters."""
    return [model_entry(name) for name in (service.model_name, *service.adapters)]


def model_entry(name: str) -> ModelEntry:
    """Entry of a served model; `created` is the start time of the server."""
    return ModelEntry(id=name, created=_START_TIME, owned_by="paddlemix-qwenvl-plugin")


def choose_adapter(service: Service, name: str) -> Optional[str]:
    """Return the name of the adapter that a request's `model` selects; None: the model without an adapter.

    Raises:
        ApiError: the server has no such model.
    """
    if name == service.model_name:
        return None
    if name in service.adapters:
        return name
    shortened = name if len(name) <= 100 else name[:99] + "…"
    served_names = ", ".join(f"`{served}`" for served in (service.model_name, *service.adapters))
    raise ApiError(
        404,
        f"The model `{shortened}` does not exist; this server has {served_names}.",
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
