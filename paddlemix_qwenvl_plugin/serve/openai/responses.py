"""The schemas of responses, for the OpenAPI document; handlers write them without these."""

from __future__ import annotations

from typing import Annotated, Literal, Optional

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class BoxOut(BaseModel):
    """A box or quad in a completion; an extension of OpenAI's form."""

    kind: Literal["box", "quad"]
    ref: Annotated[Optional[str], Field(description="What it shows, if the model said so.")]
    points: Annotated[
        list[tuple[int, int]], Field(description="(x, y) in thousandths of the width and the height.")
    ]
    pixels: Annotated[
        Optional[list[tuple[float, float]]],
        Field(description="(x, y) in pixels of the request's last image."),
    ]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: Annotated[list[int], Field(description="Of the token; it may be a part of a character.")]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: Annotated[int, Field(description="Tokens of the prompt that were not computed again.")]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: Annotated[int, Field(description="Of all choices, their stop tokens included.")]
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None
    boxes: list[BoxOut]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Optional[Logprobs]
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    boxes: list[BoxOut]
    logprobs: Optional[TextLogprobs]
    finish_reason: Optional[FinishReason]


class TextCompletion(BaseModel):
    """The response, and in a stream the data of each event."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Optional[Usage] = None


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelEntry]


class TokenizeResult(BaseModel):
    count: int
    max_model_len: Annotated[int, Field(description="Tokens of the longest prompt and its completion.")]
    tokens: list[int]


class ErrorObject(BaseModel):
    message: str
    type: str
    param: Optional[str]
    code: Optional[str]


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorObject
