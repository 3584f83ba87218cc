"""Error messages for request bodies that do not match the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paddlemix_qwenvl_plugin.serve.errors import ApiError

_MAX_NUMBER_CHARACTERS = 40

# Error types of pydantic, without "_type", and what the parameter must be.
_TYPE_WORDS = {
    "bool": "true or false",
    "dict": "an object",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model_attributes": "an object",
    "model": "an object",
    "string": "a string",
}


def invalid_body(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Convert pydantic's errors for `body` into an ApiError for the first invalid parameter.

    The message quotes no values except numbers, so that a log of it contains no text of a prompt.
    """
    if isinstance(body, bytes):  # FastAPI parses only bodies of content type JSON
        return ApiError(
            415,
            "The body is not declared as JSON; send the header Content-Type: application/json.",
            code="unsupported_media_type",
        )
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    paths = [_path(error, body) for error in errors]
    # A value of a union type has errors for each type of the union: those with the deepest path are reported, since
    # their type matched most of the value.
    parameter = paths[0][:1]
    deepest = max((path for path in paths if path[:1] == parameter), key=_depth)
    code, message = _describe([error for path, error in zip(paths, errors) if path == deepest])
    param = _dotted(deepest)
    if not param:
        return ApiError(400, f"The body {message}.", code=code)
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def _path(error: Mapping[str, Any], body: Any) -> tuple[Any, ...]:
    """Path of an error in the body: its location without the names of union types.

    For a missing, unknown or unsupported parameter, the last step is its name; for a missing or unknown tag of a union,
    it is "role" or "type".
    """
    path: list[Any] = []
    value = body
    tag_passed = False
    steps = error["loc"][1:]  # without "body"
    for number, step in enumerate(steps, start=1):
        valid_steps: Any = ()
        if isinstance(value, list):
            valid_steps = range(len(value))
        elif isinstance(value, dict):
            valid_steps = value
        # The location also contains the tag of a union: a message's role or a part's type. The tag may equal the name
        # of a parameter, such as "text": only the first such step in an object is the tag.
        if isinstance(value, dict) and step in (value.get("role"), value.get("type")) and not tag_passed:
            tag_passed = True
            continue
        if step in valid_steps:
            value = value[step]
            tag_passed = False
        elif not (error["type"] == "missing" and number == len(steps)):
            continue
        path.append(step)
    context = error.get("ctx", {})
    if error["type"].startswith("union_tag_"):
        path.append(context["discriminator"].strip("'"))
    elif error["type"] in ("unknown_parameter", "unsupported_parameter"):
        path.append(context["name"])
    return tuple(path)


def _depth(path: Sequence[Any]) -> tuple[int, list[int]]:
    """Sort key of paths: the length, then the indices in lists."""
    return len(path), [step if isinstance(step, int) else -1 for step in path]


def _describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """OpenAI's error code and the message for the errors of one value."""
    kind = errors[0]["type"]
    if kind in ("missing", "union_tag_not_found"):
        return "missing_required_parameter", "is required"
    if kind in ("unknown_parameter", "unsupported_parameter"):
        return kind, errors[0]["msg"]
    if kind == "union_tag_invalid":
        return "invalid_value", f"must be one of {errors[0]['ctx']['expected_tags']}"
    types = [_TYPE_WORDS.get(error["type"].removesuffix("_type")) for error in errors]
    if all(types):
        return "invalid_type", f"must be {' or '.join(dict.fromkeys(map(str, types)))}"
    # An error that is not a type error: the value has the right type and another problem.
    return "invalid_value", _message(next(error for error, words in zip(errors, types) if words is None))


def _message(error: Mapping[str, Any]) -> str:
    """Convert pydantic's message, such as "Input should be less than 2", to "must be less than 2, got 3".

    "after validation", which pydantic adds to numbers of items, is left out.
    """
    message = re.sub(r"^\w+ should ", "must ", str(error["msg"])).replace(" after validation", "")
    value = error["input"]
    if isinstance(value, (int, float)) and len(str(value)) < _MAX_NUMBER_CHARACTERS:
        message += f", got {value}"
    return message


def _dotted(path: Sequence[Any]) -> str:
    """Write a path as `messages[0].content`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{_shortened(step)}" if text else _shortened(step)
    return text


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:59]}…"
