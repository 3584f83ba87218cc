"""Schemas of responses for the OpenAPI document; the handlers of completions write their JSON without them."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class BoxOut(BaseModel):
    """Box or quad in a completion; an extension of OpenAI's format."""

    kind: Literal["box", "quad"]
    ref: Annotated[Optional[str], Field(description="Text of the model's <ref>, if any.")]
    points: Annotated[
        list[tuple[int, int]], Field(description="(x, y) in thousandths of the width and the height.")
    ]
    pixels: Annotated[
        Optional[list[tuple[float, float]]],
        Field(description="(x, y) in pixels of the request's last image."),
    ]


class TopLogprob(BaseModel):
    """Token with its log probability."""

    token: str
    logprob: float
    bytes: Annotated[
        list[int], Field(description="UTF-8 bytes of the token, which may be part of a character.")
    ]


class TokenLogprob(TopLogprob):
    """Generated token with its log probability and the most likely tokens."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptTokensDetails(BaseModel):
    """Details of the prompt tokens."""

    cached_tokens: Annotated[int, Field(description="Prompt tokens found in the prefix cache.")]


class Usage(BaseModel):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: Annotated[int, Field(description="Tokens of all choices, stop tokens included.")]
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """Message of a chat choice."""

    role: Literal["assistant"]
    content: str
    refusal: None = None
    boxes: list[BoxOut]


class ChatChoice(BaseModel):
    """Choice of a chat completion."""

    index: int
    message: AnswerMessage
    logprobs: Optional[Logprobs]
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """Log probabilities of a text choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """Choice of a text completion."""

    index: int
    text: str
    boxes: list[BoxOut]
    logprobs: Optional[TextLogprobs]
    finish_reason: Optional[FinishReason]


class TextCompletion(BaseModel):
    """Response of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Optional[Usage] = None


class ModelEntry(BaseModel):
    """Model of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Response of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class TokenizeResult(BaseModel):
    """Response of /tokenize."""

    count: int
    max_model_len: Annotated[
        int, Field(description="Context length: maximum tokens of a prompt and its completion.")
    ]
    tokens: list[int]


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class ErrorBody(BaseModel):
    """Body of an error response."""

    error: ErrorObject
