"""What messages and prompts are made of: text and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

from pydantic import Field

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.schema import Schema

# These stand for images in a prompt. <ref>, <box> and <quad> are how people ask for things, and are let through;
# ChatML's own tokens are plain text in any text.
_IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")

MOST_PARTS = 1024
"""Of a list in a request, so that a list of a million wrong values is not a million errors."""


class ImageURL(Schema):
    url: Annotated[str, Field(description="A data: URL, or an http(s) URL where the server allows it.")]
    detail: Annotated[Optional[str], Field(description="Accepted; an image is seen at one size.")] = None


class TextPart(Schema):
    type: Literal["text"]
    text: str


class ImagePart(Schema):
    type: Literal["image_url"]
    image_url: ImageURL


ContentPart = Annotated[Union[TextPart, ImagePart], Field(discriminator="type")]
ContentParts = Annotated[list[ContentPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]


class ImageSource(NamedTuple):
    """An image's URL, and the parameter that names it."""

    url: str
    param: str


class Query(NamedTuple):
    """Parts as processing/prompts.py takes them, and their images in order."""

    parts: list[dict[str, Any]]
    images: list[ImageSource]


def read_query(content: Union[str, Sequence[Union[TextPart, ImagePart]]], param: str) -> Query:
    """The query that is a content. An image's place in `parts` is an empty one: its URL is no part of the prompt.

    Raises:
        ApiError: a text, or texts that meet, with a tag that stands for an image.
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
                    f"{param}: a text must not contain {tag}; give an image as a part of the type image_url",
                    param=param,
                    code="invalid_value",
                )
    return query


def texts_of(parts: Sequence[dict[str, Any]]) -> list[str]:
    """The texts among the parts of a query."""
    return [part["text"] for part in parts if "text" in part]


def read_text(content: Union[str, Sequence[Union[TextPart, ImagePart]]], param: str) -> str:
    """The text of a content of a message that is not a user's.

    Raises:
        ApiError: it has an image.
    """
    if isinstance(content, str):
        return content
    text = ""
    for index, part in enumerate(content):
        if isinstance(part, ImagePart):
            where = f"{param}[{index}].type"
            raise ApiError(
                400, f"{where}: only a message of the user may have images", param=where, code="invalid_value"
            )
        text += part.text
    return text
