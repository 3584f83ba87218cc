"""Contents of messages and prompts: text and image parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema

# Tags that a user's text must not contain, since they mark image slots. <ref>, <box> and <quad> are allowed: questions
# use them. ChatML's control tokens are allowed too: in a text they are tokenized as plain text.
_IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")

MAX_PARTS = 1024
"""Maximum length of a list of messages, parts, prompts or boxes. It limits validation's time and number of errors."""


class ImageURL(Schema):
    """URL of an image part."""

    url: Annotated[str, Field(description="A data: URL, or an http(s) URL where the server allows it.")]
    detail: Annotated[Optional[str], Field(description="Accepted and ignored: images have one size.")] = None


class TextPart(Schema):
    """Text part of the `content` of a message."""

    type: Literal["text"]
    text: str


class ImagePart(Schema):
    """Image part of the `content` of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


ContentPart = Annotated[Union[TextPart, ImagePart], Field(discriminator="type")]
ContentParts = Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class ImageSource(NamedTuple):
    """URL of an image and the request parameter that contains it."""

    url: str
    param: str


class Query(NamedTuple):
    """Parts in the format of processing/prompts.py, and their images in order."""

    parts: list[dict[str, Any]]
    images: list[ImageSource]


def read_query(content: Union[str, Sequence[Union[TextPart, ImagePart]]], param: str) -> Query:
    """Convert the `content` of a message, or a prompt of that form, to a query; adjacent texts are joined.

    In the query's `parts` an image has an empty source: the URL is not part of the prompt.

    Raises:
        ApiError: a text contains an image tag; adjacent texts count as one text.
    """
    if isinstance(content, str):
        content = [TextPart(type="text", text=content)]
    query = Query([], [])
    for index, part in enumerate(content):
        if isinstance(part, ImagePart):
            query.images.append(ImageSource(part.image_url.url, f"{param}[{index}].image_url.url"))
            query.parts.append({"image": b""})
        elif query.parts and "text" in query.parts[-1]:
            query.parts[-1]["text"] += part.text
        else:
            query.parts.append({"text": part.text})
    for text in texts_of(query.parts):
        for tag in _IMAGE_TAGS:
            if tag in text:
                raise ApiError(
                    400,
                    f"{param}: a text must not contain {tag}; send an image as a part of type image_url",
                    param=param,
                    code="invalid_value",
                )
    return query


def texts_of(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the texts of a query's parts."""
    return [part["text"] for part in parts if "text" in part]


def read_text(content: Union[str, Sequence[Union[TextPart, ImagePart]]], param: str) -> str:
    """Return the text of a system or assistant message's content.

    Raises:
        ApiError: the content contains an image.
    """
    if isinstance(content, str):
        return content
    text = ""
    for index, part in enumerate(content):
        if isinstance(part, ImagePart):
            type_param = f"{param}[{index}].type"
            raise ApiError(
                400,
                f"{type_param}: only a user message may contain images",
                param=type_param,
                code="invalid_value",
            )
        text += part.text
    return text
