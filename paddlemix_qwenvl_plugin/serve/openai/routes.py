"""Routes of the OpenAI-compatible API."""

from __future__ import annotations

from typing import Any, Union

from fastapi import APIRouter, Request, Response

from paddlemix_qwenvl_plugin.serve.openai import chat, models
from paddlemix_qwenvl_plugin.serve.openai import completions as text_completions
from paddlemix_qwenvl_plugin.serve.openai import tokenize as tokenization
from paddlemix_qwenvl_plugin.serve.openai.responses import (
    ChatCompletion,
    ErrorBody,
    ModelEntry,
    ModelList,
    TextCompletion,
    TokenizeResult,
)
from paddlemix_qwenvl_plugin.serve.service import Service

_ERRORS: dict[Union[int, str], dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is invalid or was refused."},
    "5XX": {"model": ErrorBody, "description": "The server failed."},
}


def _streamable(model: type[Any], chunks: str) -> dict[Union[int, str], dict[str, Any]]:
    """Describe the responses of a route that sends one object or, with `stream`, server-sent events of `chunks`."""
    description = (
        f"One object; with `stream`, events whose data are {chunks}, then `[DONE]` or an error object."
    )
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    events = {"text/event-stream": {"itemSchema": event}}
    return {200: {"model": model, "description": description, "content": events}, **_ERRORS}


def router(service: Service) -> APIRouter:
    """Create all routes of the API."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_class=Response,
        responses=_streamable(
            ChatCompletion,
            "chat.completion.chunk objects, with `delta.boxes`",
        ),
    )
    async def chat_completions(request: Request, body: chat.ChatCompletionRequest) -> Response:
        """Create a chat completion about text and images."""
        return await chat.chat_completions(request, service, body)

    @routes.post(
        "/v1/completions",
        response_class=Response,
        responses=_streamable(TextCompletion, "text_completion objects"),
    )
    async def completions(request: Request, body: text_completions.CompletionRequest) -> Response:
        """Create a completion of a prompt."""
        return await text_completions.completions(request, service, body)

    @routes.get("/v1/models", responses=_ERRORS)
    async def list_models() -> ModelList:
        """List the served model and its adapters."""
        return ModelList(data=models.model_entries(service))

    @routes.get("/v1/models/{model}", responses=_ERRORS)
    async def get_model(model: str) -> ModelEntry:
        """Get a served model by its name."""
        models.choose_adapter(service, model)  # raises the 404 of an unknown model
        return models.model_entry(model)

    @routes.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: tokenization.TokenizeRequest) -> TokenizeResult:
        """Tokenize a prompt."""
        return await tokenization.tokenize(service, body)

    return routes
