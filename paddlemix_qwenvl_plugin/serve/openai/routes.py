"""The routes of OpenAI's interface."""

from __future__ import annotations

from typing import Any, Union

from fastapi import APIRouter, Request, Response

from paddlemix_qwenvl_plugin.serve.openai import chat, models
from paddlemix_qwenvl_plugin.serve.openai import completions as text
from paddlemix_qwenvl_plugin.serve.openai import tokenize as tokens
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
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request."},
    "5XX": {"model": ErrorBody, "description": "Why there is no answer."},
}


def _or_events(model: type[Any], chunk: str) -> dict[Union[int, str], dict[str, Any]]:
    """The responses of a route that answers whole or, with `stream`, in events."""
    described = f"Whole, or with `stream` in events whose data are {chunk}, after the last one `[DONE]`."
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    events = {"text/event-stream": {"itemSchema": event}}
    return {200: {"model": model, "description": described, "content": events}, **_ERRORS}


def router(service: Service) -> APIRouter:
    """All routes, for the app to include."""
    routes = APIRouter()

    @routes.post(
        "/v1/chat/completions",
        response_class=Response,
        responses=_or_events(
            ChatCompletion,
            "chat.completion.chunk objects, with `delta.boxes`",
        ),
    )
    async def chat_completions(request: Request, body: chat.ChatCompletionRequest) -> Response:
        """Answer a conversation about images."""
        return await chat.chat_completions(request, service, body)

    @routes.post(
        "/v1/completions",
        response_class=Response,
        responses=_or_events(TextCompletion, "text_completion objects"),
    )
    async def completions(request: Request, body: text.CompletionRequest) -> Response:
        """Go on with a prompt."""
        return await text.completions(request, service, body)

    @routes.get("/v1/models", responses=_ERRORS)
    async def list_models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[models.model_entry(service)])

    @routes.get("/v1/models/{model}", responses=_ERRORS)
    async def get_model(model: str) -> ModelEntry:
        """The model, by its name."""
        models.check_model(service, model)
        return models.model_entry(service)

    @routes.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: tokens.TokenizeRequest) -> TokenizeResult:
        """The tokens that a prompt has."""
        return await tokens.tokenize(service, body)

    return routes
