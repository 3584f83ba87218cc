"""OpenAI's batch format: {"custom_id": …, "body": {"messages": […]}} in, {"custom_id": …, "response": …} out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from paddlemix_qwenvl_plugin.batch.request import Reply, RowId, RowRequest, check_keys, check_type
from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

# A row with one of these keys is in this format.
MARKS = ("custom_id", "body")

_FIXED = {"method": "POST", "url": "/v1/chat/completions"}

# Keys of the body without effect on the answer, except that `model` may name an adapter; keys that accept only their
# default.
_IGNORED = ("model", "user", "metadata")
_DEFAULT_ONLY = {"n": 1, "stream": False}

# Key of the body -> generation option.
_OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")},
}


def read(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> RowRequest:
    """Parse a row, from which the caller has removed null values; `defaults`: generation options that the row may omit.

    Raises:
        UsageError: an unknown key, an invalid value, or keys that do not fit together; the message names them.
    """
    check_keys(values, ["custom_id", "body", *_FIXED])
    for key, value in _FIXED.items():
        if values.get(key, value) != value:
            raise UsageError(f"{key}: must be {value}")
    body = _without_nulls(check_type(values.get("body"), dict, "body"))
    check_keys(body, ["messages", *_IGNORED, *_DEFAULT_ONLY, *_OPTIONS], "body.")
    for key, default in _DEFAULT_ONLY.items():
        if body.get(key, default) != default:
            raise UsageError(f"body.{key}: can only be {str(default).lower()}")
    requested: dict[str, Any] = {}
    for key in _OPTIONS.keys() & body.keys():
        if requested.setdefault(_OPTIONS[key], body[key]) != body[key]:
            raise UsageError("body.max_tokens: another value than body.max_completion_tokens")
    system, history, query = _conversation(check_type(body.get("messages"), list, "body.messages"))
    options = GenerationOptions.of({**defaults, **requested})
    return RowRequest(
        Request(query, options, True, history, DEFAULT_SYSTEM if system is None else system),
        check_type(body.get("model", RowRequest.model), str, "body.model"),
    )


def reply(row_id: RowId, reply: Reply, tag: str) -> dict[str, Any]:
    """Build the output row of an answer, with a chat.completion object; `tag`: the unique request id."""
    message = {"role": "assistant", "content": reply.answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.answer.finish_reason}
    body = {
        "id": f"chatcmpl-{tag}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": reply.model,
        "choices": [choice],
        "usage": reply.usage,
    }
    response = {"status_code": 200, "request_id": f"req_{tag}", "body": body}
    return {"id": f"batch_req_{tag}", "custom_id": row_id, "response": response, "error": None}


def failure(row_id: RowId, code: str, message: str, tag: str) -> dict[str, Any]:
    """Build the output row of an error; `tag` as in `reply`."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{tag}", "custom_id": row_id, "response": None, "error": error}


def _conversation(
    messages: list[Any],
) -> tuple[str | None, list[tuple[Query, str]], list[dict[str, Any]]]:
    """Parse messages into the system message, the earlier turns and the last question."""
    system: str | None = None
    turns: list[list[dict[str, Any]]] = []
    for index, message in enumerate(messages):
        where = f"body.messages[{index}]"
        fields = _without_nulls(check_type(message, dict, where))
        check_keys(fields, ["role", "content"], f"{where}.")
        role, expected = fields.get("role"), "assistant" if len(turns) % 2 else "user"
        if role == "system" and index == 0:
            system = _text(_parts(fields.get("content"), where), where)
        elif role == expected:
            turns.append(_parts(fields.get("content"), where))
        else:
            raise UsageError(
                f"{where}.role: must be {expected} here, got {role!r:.40}; "
                "a conversation is system (optional), then user and assistant alternating"
            )
    if len(turns) % 2 == 0:
        raise UsageError("body.messages: must end with a user message")
    answers = [_text(parts, "an assistant message in body.messages") for parts in turns[1::2]]
    return system, list(zip(turns[::2], answers)), turns[-1]


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """Convert a message's content to parts of a query."""
    if isinstance(content, str):
        return [{"text": content}]
    if not isinstance(content, list) or not content:
        raise UsageError(f"{where}.content: must be a string or a list of text and image_url parts")
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    fields = _without_nulls(check_type(part, dict, where))
    kind = fields.get("type")
    if kind == "text":
        check_keys(fields, ["type", "text"], f"{where}.")
        return {"text": check_type(fields.get("text"), str, f"{where}.text")}
    if kind == "image_url":
        check_keys(fields, ["type", "image_url"], f"{where}.")
        image_url = check_type(fields.get("image_url"), dict, f"{where}.image_url")
        check_keys(image_url, ["url", "detail"], f"{where}.image_url.")  # detail has no effect
        return {"image": check_type(image_url.get("url"), str, f"{where}.image_url.url")}
    raise UsageError(f"{where}.type: must be text or image_url, got {kind!r:.40}")


def _text(parts: list[dict[str, Any]], where: str) -> str:
    if any("image" in part for part in parts):
        raise UsageError(f"{where}: only a user message may contain an image")
    return "".join(part["text"] for part in parts)


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
