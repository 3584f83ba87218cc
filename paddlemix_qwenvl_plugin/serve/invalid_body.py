"""Error messages for request bodies that do not match the schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from paddlemix_qwenvl_plugin.serve.errors import ApiError

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

    The message quotes no values except numbers: messages are logged, and client text must not be.
    """
    if isinstance(body, bytes):
        return ApiError(
            415,
            "The body is not declared as JSON; send the header Content-Type: application/json.",
            code="unsupported_media_type",
        )
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json")
    located = [(_path(error, body), error) for error in errors]
    # A union has an error for each of its types: report the one that matched deepest.
    top = located[0][0][:1]
    path = max((path for path, _ in located if path[:1] == top), key=_depth)
    same = [error for other, error in located if other == path]
    param = _dotted(path)
    code, what = _describe(same)
    if not param:
        return ApiError(400, f"The body {what}.", code=code)
    return ApiError(400, f"{param}: {what}", param=param, code=code)


def _path(error: Mapping[str, Any], body: Any) -> tuple[Any, ...]:
    """Path of an error in the body: its location without the names of union types."""
    path: list[Any] = []
    value = body
    tag_passed = False
    steps = error["loc"][1:]  # without "body"
    for number, step in enumerate(steps, start=1):
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        # A message's role and a part's type are steps too, and may have the name of a parameter.
        if isinstance(value, dict) and step in (value.get("role"), value.get("type")) and not tag_passed:
            tag_passed = True
            continue
        if step in inside:
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
    # An error other than a type error: the value has this type of the union.
    return "invalid_value", _message(next(error for error, kind in zip(errors, types) if not kind))


def _message(error: Mapping[str, Any]) -> str:
    what = re.sub(r"^\w+ should ", "must ", str(error["msg"])).replace(" after validation", "")
    value = error["input"]
    return f"{what}, got {value}" if isinstance(value, (int, float)) and len(str(value)) < 40 else what


def _dotted(path: Sequence[Any]) -> str:
    """Write a path as `messages[0].content`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{_shortened(step)}" if text else _shortened(step)
    return text


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:59]}…"
