"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Optional, Union

from fastapi import Request, Response
from pydantic import Field

from paddlemix_qwenvl_plugin.serve.openai import prompt
from paddlemix_qwenvl_plugin.serve.openai.completion import CompletionSpec
from paddlemix_qwenvl_plugin.serve.openai.content import MAX_PARTS, ContentParts, read_query
from paddlemix_qwenvl_plugin.serve.openai.forms import TextForm
from paddlemix_qwenvl_plugin.serve.openai.models import choose_adapter
from paddlemix_qwenvl_plugin.serve.openai.parameters import SamplingParameters, too_large
from paddlemix_qwenvl_plugin.serve.openai.prompt import ReadyPrompt
from paddlemix_qwenvl_plugin.serve.openai.respond import respond
from paddlemix_qwenvl_plugin.serve.service import Service

# The maximum lengths limit the time of validation; prompt.py checks the length of each prompt.
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Tokens = Annotated[list[_Token], Field(min_length=1, max_length=65536, fail_fast=True)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
_TokenLists = Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class CompletionRequest(SamplingParameters):
    """Body of a completion request: prompts in the base model's format, without a chat template."""

    # Parameter -> values that are accepted, since they request what the server does anyway (Schema).
    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingParameters.not_supported,
        "best_of": (1,),
        "echo": (),
        "suffix": (),
    }

    prompt: Annotated[
        Union[str, _Texts, _Tokens, _TokenLists, ContentParts],
        Field(
            description="A text, a list of texts, token ids, a list of token id lists, or (an extension) one prompt of "
            "text and image_url parts as in a chat message."
        ),
    ]
    logprobs: Annotated[
        Optional[int],
        Field(
            ge=0,
            le=20,
            description="Return the log probability of each token and of this number of most likely tokens.",
        ),
    ] = None


async def completions(request: Request, service: Service, body: CompletionRequest) -> Response:
    """Handle a completion request, streamed or not.

    Raises:
        ApiError: the request is invalid or failed.
    """
    adapter = choose_adapter(service, body.model)
    options = body.options(service.settings)
    spec = CompletionSpec(
        prompts=await _prompts(service, body),
        stop_token_ids=[service.tokenizer.eod_id],
        options=options,
        n=body.n or 1,
        stop_strings=body.stop_strings,
        n_logprobs=body.logprobs,
        adapter=adapter,
    )
    with_logprobs = body.logprobs is not None
    form = TextForm(body.model, service.tokenizer, with_logprobs, body.include_usage)
    return await respond(request, service, spec, form, body)


async def _prompts(service: Service, body: CompletionRequest) -> list[ReadyPrompt]:
    """Tokenize the prompts of a request, whose `prompt` has one of five types; see CompletionRequest."""
    value: Any = body.prompt
    if isinstance(value, str):
        return [await prompt.base(service, read_query(value, "prompt"), "prompt")]
    if isinstance(value[0], int):  # the token ids of one prompt
        return [prompt.token_ids(service, value, "prompt")]
    if not isinstance(value[0], (str, list)):  # the text and image parts of one prompt
        return [await prompt.base(service, read_query(value, "prompt"), "prompt")]
    n_choices, limit = len(value) * (body.n or 1), service.settings.max_choices
    if n_choices > limit:
        raise too_large("prompt: number of completions", n_choices, limit, "prompt")
    ready_prompts = []
    for index, item in enumerate(value):
        param = f"prompt[{index}]"
        if isinstance(item, str):
            ready_prompts.append(await prompt.base(service, read_query(item, param), param))
        else:
            ready_prompts.append(prompt.token_ids(service, item, param))
    return ready_prompts
