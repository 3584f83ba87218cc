"""Chat messages and their conversion to a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.content import (
    MAX_PARTS,
    ContentParts,
    ImageSource,
    Query,
    read_query,
    read_text,
)
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema

_Name = Annotated[Optional[str], Field(description="Ignored.")]


class SystemMessage(Schema):
    """System message."""

    role: Literal["system", "developer"]
    content: Union[str, ContentParts]
    name: _Name = None


class UserMessage(Schema):
    """User message: text and images."""

    role: Literal["user"]
    content: Union[str, ContentParts]
    name: _Name = None


class AssistantMessage(Schema):
    """Earlier answer of the model, as the server returned it."""

    # No value of these keys is accepted, except null, false, 0 and empty values (schema.py).
    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(
        ("annotations", "audio", "function_call", "refusal", "tool_calls"), ()
    )

    role: Literal["assistant"]
    content: Union[str, ContentParts]
    name: _Name = None
    boxes: Annotated[
        Optional[list[dict[str, Any]]],
        Field(max_length=MAX_PARTS, description="Ignored; the content contains them.", fail_fast=True),
    ] = None


Message = Annotated[Union[SystemMessage, UserMessage, AssistantMessage], Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class Conversation(NamedTuple):
    """Arguments of chat_prompt (processing/prompts.py) and the images of all turns in order.

    Attributes:
        history: (parts of the question, answer) of each earlier turn.
        query: parts of the last question.
    """

    system: str
    history: list[tuple[list[dict[str, Any]], str]]
    query: list[dict[str, Any]]
    images: list[ImageSource]


def read_conversation(
    messages: Sequence[Union[SystemMessage, UserMessage, AssistantMessage]],
) -> Conversation:
    """Convert messages to a conversation: system messages first, then user and assistant alternating, user last.

    Consecutive messages of one role are joined into one, with a line break between them.

    Raises:
        ApiError: the messages are in another order, a user's text contains an image tag, or a message of another role
            contains an image.
    """
    system: list[str] = []
    queries: list[Query] = []
    answers: list[str] = []
    for index, message in enumerate(messages):
        role_param, content_param = f"messages[{index}].role", f"messages[{index}].content"
        if isinstance(message, SystemMessage):
            if queries:
                raise _wrong_order(role_param, "system messages must come first")
            system.append(read_text(message.content, content_param))
        elif isinstance(message, UserMessage):
            query = read_query(message.content, content_param)
            if len(queries) > len(answers):  # consecutive user messages
                previous = queries[-1]
                queries[-1] = Query(
                    [*previous.parts, {"text": "\n"}, *query.parts], [*previous.images, *query.images]
                )
            else:
                queries.append(query)
        elif not queries:
            raise _wrong_order(role_param, "a user message must come before an assistant message")
        elif len(answers) == len(queries):  # consecutive assistant messages
            answers[-1] += "\n" + read_text(message.content, content_param)
        else:
            answers.append(read_text(message.content, content_param))
    if len(queries) == len(answers):
        raise _wrong_order("messages", "the last message must be a user message")
    return Conversation(
        "\n".join(system) if system else DEFAULT_SYSTEM,
        [(query.parts, answer) for query, answer in zip(queries, answers)],
        queries[-1].parts,
        [image for query in queries for image in query.images],
    )


def _wrong_order(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
