"""The messages of a chat, and the conversation that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.content import (
    MOST_PARTS,
    ContentParts,
    ImageSource,
    Query,
    read_query,
    read_text,
)
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema

_Name = Annotated[Optional[str], Field(description="Accepted; the model does not see it.")]


class SystemMessage(Schema):
    role: Literal["system", "developer"]
    content: Union[str, ContentParts]
    name: _Name = None


class UserMessage(Schema):
    role: Literal["user"]
    content: Union[str, ContentParts]
    name: _Name = None


class AssistantMessage(Schema):
    """An earlier answer, as the server gave it."""

    not_supported: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(
        ("annotations", "audio", "function_call", "refusal", "tool_calls"), ()
    )

    role: Literal["assistant"]
    content: Union[str, ContentParts]
    name: _Name = None
    boxes: Annotated[
        Optional[list[dict[str, Any]]],
        Field(max_length=MOST_PARTS, description="Accepted; they are in the content.", fail_fast=True),
    ] = None


Message = Annotated[Union[SystemMessage, UserMessage, AssistantMessage], Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


class Conversation(NamedTuple):
    """The arguments of chat_prompt (processing/prompts.py), and the images of all turns in order."""

    system: str
    history: list[tuple[list[dict[str, Any]], str]]
    query: list[dict[str, Any]]
    images: list[ImageSource]


def read_conversation(
    messages: Sequence[Union[SystemMessage, UserMessage, AssistantMessage]],
) -> Conversation:
    """The conversation that messages make: system messages first, then user and assistant in turn, user last.

    Messages of one role that follow each other are one turn, a line each.

    Raises:
        ApiError: another order, or a text with a tag that stands for an image.
    """
    system: list[str] = []
    queries: list[Query] = []
    answers: list[str] = []
    for index, message in enumerate(messages):
        param = f"messages[{index}]"
        content = f"{param}.content"
        if isinstance(message, SystemMessage):
            if queries:
                raise _wrong_order(f"{param}.role", "system messages come first")
            system.append(read_text(message.content, content))
        elif isinstance(message, UserMessage):
            query = read_query(message.content, content)
            if len(queries) > len(answers):  # two in a row
                queries[-1] = Query(
                    [*queries[-1].parts, {"text": "\n"}, *query.parts], [*queries[-1].images, *query.images]
                )
            else:
                queries.append(query)
        elif not queries:
            raise _wrong_order(f"{param}.role", "a message of the user comes before one of the assistant")
        elif len(answers) == len(queries):
            answers[-1] += "\n" + read_text(message.content, content)
        else:
            answers.append(read_text(message.content, content))
    if len(queries) == len(answers):
        raise _wrong_order("messages", "the last message must be one of the user")
    return Conversation(
        "\n".join(system) if system else DEFAULT_SYSTEM,
        [(query.parts, answer) for query, answer in zip(queries, answers)],
        queries[-1].parts,
        [image for query in queries for image in query.images],
    )


def _wrong_order(param: str, what: str) -> ApiError:
    return ApiError(400, f"{param}: {what}", param=param, code="invalid_value")
