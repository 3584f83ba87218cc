"""Prompts of requests: tokenization in a thread, checks of the length."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from paddlemix_qwenvl_plugin.processing.prompts import Prompt, base_prompt, chat_prompt
from paddlemix_qwenvl_plugin.processing.tokenizer import IMAGE_TAGS
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.content import ImageSource, Query, texts_of
from paddlemix_qwenvl_plugin.serve.openai.messages import Conversation
from paddlemix_qwenvl_plugin.serve.openai.parameters import too_large
from paddlemix_qwenvl_plugin.serve.service import Service
from paddlemix_qwenvl_plugin.util.errors import UsageError


@dataclass(frozen=True)
class ReadyPrompt:
    """Tokenized prompt within the server's limits.

    Attributes:
        token_ids: token ids, image slots included.
        images: sources of the images, one for each `<img>`, in order.
        generated: [start, end) ranges of `token_ids` that are earlier answers, which the engine computes as decode
            steps, as when it generated them: a prefill would round differently.
    """

    token_ids: list[int]
    images: list[ImageSource] = field(default_factory=list)
    generated: list[tuple[int, int]] = field(default_factory=list)


async def chat(service: Service, conversation: Conversation) -> ReadyPrompt:
    """Build the chat prompt of a conversation; if it is too long, no turns are dropped, and an error is raised.

    Raises:
        ApiError: the prompt exceeds a limit or cannot be tokenized.
    """
    system, history, query, images = conversation
    texts = [system, *(answer for _, answer in history), *texts_of(query)]
    texts += [text for parts, _ in history for text in texts_of(parts)]
    return await _ready(
        service,
        "messages",
        texts,
        images,
        lambda: chat_prompt(service.tokenizer, query, history, system, max_window=sys.maxsize),
    )


async def base(service: Service, query: Query, param: str) -> ReadyPrompt:
    """Build a prompt in the base model's format. Raises ApiError as `chat`."""
    return await _ready(
        service,
        param,
        texts_of(query.parts),
        query.images,
        lambda: base_prompt(service.tokenizer, query.parts),
    )


def token_ids(service: Service, ids: list[int], param: str) -> ReadyPrompt:
    """Check a prompt that the client has tokenized. The schema of requests excludes empty prompts and negative ids.

    Raises:
        ApiError: the prompt exceeds a limit, or contains a control token, an image tag or an unknown id.
    """
    special_ids = service.tokenizer.special_tokens
    # The tags of references, boxes and quads are accepted, the tags of images are not.
    tag_ids = {special_ids[tag] for tag in IMAGE_TAGS if "img" not in tag}
    n_text_tokens = min(special_ids.values())  # the ids of text tokens are below those of special tokens
    for index, token_id in enumerate(ids):
        if not (token_id < n_text_tokens or token_id in tag_ids):
            token_param = f"{param}[{index}]"
            raise ApiError(
                400,
                f"{token_param}: {token_id} is not a text token; control tokens are not accepted",
                param=token_param,
                code="invalid_value",
            )
    _check_length(service, len(ids), param)
    return ReadyPrompt(ids)


def _max_prompt_tokens(service: Service) -> int:
    """Maximum length of a prompt in tokens."""
    limit = service.config.max_position_embeddings - 1  # leaves room for one generated token
    return min(limit, service.settings.max_prompt_tokens or limit)


async def _ready(
    service: Service,
    param: str,
    texts: Sequence[str],
    images: Sequence[ImageSource],
    tokenize: Callable[[], Prompt],
) -> ReadyPrompt:
    """Tokenize a prompt and check its limits; `texts` are all its texts, `tokenize` computes its tokens."""
    if len(images) > service.settings.max_images:
        raise too_large(f"{param}: number of images", len(images), service.settings.max_images, param)
    # A very long prompt is refused before its tokenization, by a lower bound on its number of tokens.
    tokenizer = service.tokenizer
    min_tokens = sum(map(len, texts)) // tokenizer.max_token_bytes + tokenizer.n_image_slots * len(images)
    if min_tokens > _max_prompt_tokens(service):
        _refuse_length(service, f"at least {min_tokens}", param)
    try:
        prompt = await asyncio.to_thread(tokenize)
    except UsageError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error
    _check_length(service, len(prompt.input_ids), param)
    return ReadyPrompt(prompt.input_ids, list(images), prompt.generated)


def _check_length(service: Service, n_tokens: int, param: str) -> None:
    if n_tokens > _max_prompt_tokens(service):
        _refuse_length(service, str(n_tokens), param)
    if n_tokens == 0:
        raise ApiError(400, f"{param}: is empty", param=param, code="invalid_value")


def _refuse_length(service: Service, n_tokens: str, param: str) -> NoReturn:
    raise ApiError(
        400,
        f"This model's maximum context length is {_max_prompt_tokens(service)} tokens in a prompt. However, your "
        f"{param} resulted in {n_tokens} tokens. Please reduce the length of the {param}.",
        param=param,
        code="context_length_exceeded",
    )
