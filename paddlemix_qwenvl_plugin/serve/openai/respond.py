"""Response to a completion request, streamed or not."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response

from paddlemix_qwenvl_plugin.serve.errors import ClientGone
from paddlemix_qwenvl_plugin.serve.openai.completion import Completion, CompletionSpec
from paddlemix_qwenvl_plugin.serve.openai.connection import EventStream, while_connected
from paddlemix_qwenvl_plugin.serve.openai.forms import Choice, Form
from paddlemix_qwenvl_plugin.serve.openai.json_text import dumps
from paddlemix_qwenvl_plugin.serve.openai.parameters import SamplingParameters
from paddlemix_qwenvl_plugin.serve.request_info import info_of
from paddlemix_qwenvl_plugin.serve.service import Service

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected before its response; only logs and metrics contain it."""


async def respond(
    request: Request, service: Service, spec: CompletionSpec, form: Form, parameters: SamplingParameters
) -> Response:
    """Create the response to a request.

    Raises:
        ApiError, QwenVLError: see Completion.events. A streamed response raises them while it is sent, and only before
            its first event; later it reports them as its last event (EventStream).
    """
    completion = Completion(service, spec, info_of(request.scope))
    if parameters.stream:
        return EventStream(_stream_data(completion, form, parameters.include_usage))
    try:
        body = await while_connected(request.receive, _complete_response(completion, form))
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(dumps(body), media_type="application/json")


async def _stream_data(completion: Completion, form: Form, with_usage: bool) -> AsyncGenerator[str, None]:
    """Yield the data of the server-sent events: a chunk for each event, the usage if requested, [DONE]."""
    events = completion.events()
    try:
        async for event in events:
            yield form.chunk(event)
    finally:
        await events.aclose()
    if with_usage:
        yield form.usage_chunk(_usage(completion))
    yield "[DONE]"


async def _complete_response(completion: Completion, form: Form) -> dict[str, Any]:
    choices = [Choice() for _ in range(completion.n_choices)]
    async for event in completion.events():
        choices[event.choice].add(event)
    return form.complete(choices, _usage(completion))


def _usage(completion: Completion) -> dict[str, Any]:
    return {
        "prompt_tokens": completion.n_prompt_tokens,
        "completion_tokens": completion.n_completion_tokens,
        "total_tokens": completion.n_prompt_tokens + completion.n_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": completion.n_cached_tokens},
    }
