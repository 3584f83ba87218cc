"""OpenAI's batch form: {"custom_id": …, "body": {"messages": […]}} in, {"custom_id": …, "response": …} out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from paddlemix_qwenvl_plugin.batch.request import Asked, Reply, RowId, check_keys, check_type
from paddlemix_qwenvl_plugin.processing.prompts import Query
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

# A row with one of these keys is in this form.
MARKS = ("custom_id", "body")

_FIXED = {"method": "POST", "url": "/v1/chat/completions"}

# Those that change nothing here, and the values that ask for what happens anyway.
_IGNORED = ("model", "user", "metadata")
_HARMLESS = {"n": 1, "stream": False}

_OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "seed", "frequency_penalty", "presence_penalty")},
}


def read(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Asked:
    """The request of a row without null values.

    Raises:
        UsageError: an unknown key, or a value that cannot be; the line names it.
    """
    check_keys(values, ["custom_id", "body", *_FIXED])
    for key, value in _FIXED.items():
        if values.get(key, value) != value:
            raise UsageError(f"{key}: must be {value}")
    body = _given(check_type(values.get("body"), dict, "body"))
    check_keys(body, ["messages", *_IGNORED, *_HARMLESS, *_OPTIONS], "body.")
    for key, harmless in _HARMLESS.items():
        if body.get(key, harmless) != harmless:
            raise UsageError(f"body.{key}: can only be {str(harmless).lower()}")
    asked: dict[str, Any] = {}
    for key in _OPTIONS.keys() & body.keys():
        if asked.setdefault(_OPTIONS[key], body[key]) != body[key]:
            raise UsageError("body.max_tokens: another value than body.max_completion_tokens")
    system, history, query = _conversation(check_type(body.get("messages"), list, "body.messages"))
    options = GenerationOptions.of({**defaults, **asked})
    return Asked(
        Request(query, options, True, history, DEFAULT_SYSTEM if system is None else system),
        check_type(body.get("model", Asked.model), str, "body.model"),
    )


def reply(row_id: RowId, reply: Reply, tag: str) -> dict[str, Any]:
    """The output row of an answer, with a chat.completion object."""
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
    """The output row of an error."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{tag}", "custom_id": row_id, "response": None, "error": error}


def _conversation(
    messages: list[Any],
) -> tuple[str | None, list[tuple[Query, str]], list[dict[str, Any]]]:
    """The system message, the earlier turns and the last question."""
    system: str | None = None
    turns: list[list[dict[str, Any]]] = []
    for index, message in enumerate(messages):
        where = f"body.messages[{index}]"
        given = _given(check_type(message, dict, where))
        check_keys(given, ["role", "content"], f"{where}.")
        role, wanted = given.get("role"), "assistant" if len(turns) % 2 else "user"
        if role == "system" and index == 0:
            system = _text(_parts(given.get("content"), where), where)
        elif role == wanted:
            turns.append(_parts(given.get("content"), where))
        else:
            raise UsageError(
                f"{where}.role: must be {wanted} here, got {role!r:.40}; "
                "a conversation is system (optional), then user and assistant in turn"
            )
    if len(turns) % 2 == 0:
        raise UsageError("body.messages: must end with a message of the user")
    answers = [_text(parts, "a message of the assistant in body.messages") for parts in turns[1::2]]
    return system, list(zip(turns[::2], answers)), turns[-1]


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A message's content as parts of a query."""
    if isinstance(content, str):
        return [{"text": content}]
    if not isinstance(content, list) or not content:
        raise UsageError(f"{where}.content: must be a string or a list of text and image_url parts")
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    given = _given(check_type(part, dict, where))
    kind = given.get("type")
    if kind == "text":
        check_keys(given, ["type", "text"], f"{where}.")
        return {"text": check_type(given.get("text"), str, f"{where}.text")}
    if kind == "image_url":
        check_keys(given, ["type", "image_url"], f"{where}.")
        picture = check_type(given.get("image_url"), dict, f"{where}.image_url")
        check_keys(picture, ["url", "detail"], f"{where}.image_url.")
        return {"image": check_type(picture.get("url"), str, f"{where}.image_url.url")}
    raise UsageError(f"{where}.type: must be text or image_url, got {kind!r:.40}")


def _text(parts: list[dict[str, Any]], where: str) -> str:
    if any("image" in part for part in parts):
        raise UsageError(f"{where}: only a message of the user may have a picture")
    return "".join(part["text"] for part in parts)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
