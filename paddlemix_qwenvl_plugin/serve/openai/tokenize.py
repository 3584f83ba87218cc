"""POST /tokenize."""

from __future__ import annotations

from typing import Annotated, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai import prompt
from paddlemix_qwenvl_plugin.serve.openai.content import ContentParts, read_query
from paddlemix_qwenvl_plugin.serve.openai.messages import Messages, read_conversation
from paddlemix_qwenvl_plugin.serve.openai.models import check_is_chat, choose_adapter
from paddlemix_qwenvl_plugin.serve.openai.responses import TokenizeResult
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema
from paddlemix_qwenvl_plugin.serve.service import Service


class TokenizeRequest(Schema):
    """Body of a tokenize request: a `prompt` of text or parts as for /v1/completions, or `messages` as for chat."""

    model: Optional[str] = None
    prompt: Annotated[Optional[Union[str, ContentParts]], Field(description="As in /v1/completions.")] = None
    messages: Annotated[Optional[Messages], Field(description="As in /v1/chat/completions.")] = None


async def tokenize(service: Service, body: TokenizeRequest) -> TokenizeResult:
    """Tokenize a request's prompt; images count as their slots and are not loaded.

    Raises:
        ApiError: the request is invalid.
    """
    if body.model is not None:
        # Only checks the name: the tokens are the same for all adapters.
        choose_adapter(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt and messages: give one of them", param="prompt", code="invalid_value")
    if body.messages is not None:
        check_is_chat(service)
        ready = await prompt.chat(service, read_conversation(body.messages))
    else:
        assert body.prompt is not None
        ready = await prompt.base(service, read_query(body.prompt, "prompt"), "prompt")
    return TokenizeResult(
        count=len(ready.token_ids),
        max_model_len=service.config.max_position_embeddings,
        tokens=ready.token_ids,
    )
