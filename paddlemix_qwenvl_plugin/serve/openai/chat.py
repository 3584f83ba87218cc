"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Optional

from fastapi import Request, Response
from pydantic import Field

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai import prompt
from paddlemix_qwenvl_plugin.serve.openai.completion import CompletionSpec
from paddlemix_qwenvl_plugin.serve.openai.forms import ChatForm
from paddlemix_qwenvl_plugin.serve.openai.messages import Messages, read_conversation
from paddlemix_qwenvl_plugin.serve.openai.models import check_is_chat, choose_adapter
from paddlemix_qwenvl_plugin.serve.openai.parameters import SamplingParameters
from paddlemix_qwenvl_plugin.serve.openai.respond import respond
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings


class ChatCompletionRequest(SamplingParameters):
    """Body of a chat completion request. The response contains the model's boxes as `boxes`."""

    # Parameter -> values that are accepted, since they request what the server does anyway (Schema).
    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingParameters.not_supported,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": (),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True,),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (),
        "tool_choice": ("none", "auto"),
        "tools": (),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Messages
    max_completion_tokens: Annotated[Optional[int], Field(ge=1, description="Alias of max_tokens.")] = None
    logprobs: Annotated[
        Optional[bool],
        Field(description="Return the log probability of each token before sampling parameters."),
    ] = None
    top_logprobs: Annotated[
        Optional[int],
        Field(ge=0, le=20, description="With logprobs: number of most likely tokens to return as well."),
    ] = None
    metadata: Annotated[Optional[dict[str, Any]], Field(max_length=16, description="Ignored.")] = None
    prompt_cache_key: Annotated[Optional[str], Field(description="Ignored.")] = None
    safety_identifier: Annotated[Optional[str], Field(description="Ignored.")] = None

    def options(self, settings: ServeSettings) -> GenerationOptions:
        """Convert the parameters as SamplingParameters.options does; ApiError for top_logprobs without logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs: only with logprobs: true", param="top_logprobs", code="invalid_value"
            )
        return super().options(settings)

    @property
    def requested_max_tokens(self) -> tuple[str, Optional[int]]:
        """Name and value of the requested maximum, max_completion_tokens or max_tokens; ApiError if the two differ."""
        if self.max_completion_tokens is None:
            return super().requested_max_tokens
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(
                400,
                "max_tokens: differs from max_completion_tokens; give only one of them",
                param="max_tokens",
                code="invalid_value",
            )
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def n_logprobs(self) -> Optional[int]:
        """Number of most likely tokens reported per token; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


async def chat_completions(request: Request, service: Service, body: ChatCompletionRequest) -> Response:
    """Handle a chat completion request, streamed or not.

    Raises:
        ApiError: the request is invalid or failed.
    """
    adapter = choose_adapter(service, body.model)
    check_is_chat(service)
    options = body.options(service.settings)
    conversation = read_conversation(body.messages)
    spec = CompletionSpec(
        prompts=[await prompt.chat(service, conversation)],
        stop_token_ids=service.tokenizer.chat_stop_token_ids,
        options=options,
        n=body.n or 1,
        stop_strings=body.stop_strings,
        n_logprobs=body.n_logprobs,
        adapter=adapter,
    )
    with_logprobs = body.n_logprobs is not None
    form = ChatForm(body.model, service.tokenizer, with_logprobs, body.include_usage)
    return await respond(request, service, spec, form, body)
