"""Plain batch format: {"id": …, "image": …, "prompt": …} in, {"id": …, "text": …, "boxes": …, …} out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from paddlemix_qwenvl_plugin.batch.request import Reply, RowId, RowRequest, check_keys, check_type
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.request import DEFAULT_SYSTEM, Request
from paddlemix_qwenvl_plugin.util.errors import UsageError

_OPTIONS = [field.name for field in fields(GenerationOptions)]


def read(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> RowRequest:
    """Parse a row, from which the caller has removed null values; `defaults`: generation options that the row may omit.

    Raises:
        UsageError: an unknown key, an invalid value, or keys that do not fit together; the message names them.
    """
    check_keys(values, ["id", "image", "images", "prompt", "chat", "system", "adapter", *_OPTIONS])
    if "image" in values and "images" in values:
        raise UsageError("image and images: give one of them")
    images = [values["image"]] if "image" in values else check_type(values.get("images", []), list, "images")
    prompt = check_type(values.get("prompt", ""), str, "prompt")
    if not images and not prompt:
        raise UsageError("nothing to ask: give prompt, image or both")
    chat = check_type(values["chat"], bool, "chat") if "chat" in values else None
    if "system" in values and not chat:
        raise UsageError('system: only a chat has a system message; add "chat": true')
    where = "image" if "image" in values else "an item of images"
    image_parts = [{"image": check_type(image, str, where)} for image in images]
    options = GenerationOptions.of({**defaults, **{key: values[key] for key in _OPTIONS if key in values}})
    system = check_type(values.get("system", DEFAULT_SYSTEM), str, "system")
    adapter = check_type(values["adapter"], str, "adapter") if "adapter" in values else None
    parts = [*image_parts, {"text": prompt}] if prompt else image_parts
    return RowRequest(Request(parts, options, chat, (), system, adapter))


def reply(row_id: RowId, reply: Reply) -> dict[str, Any]:
    """Build the output row of an answer."""
    answer = reply.answer.as_dict()
    answer_fields = {key: answer[key] for key in ("text", "boxes", "finish_reason")}
    return {"id": row_id, **answer_fields, "usage": reply.usage}


def failure(row_id: RowId, message: str) -> dict[str, Any]:
    """Build the output row of an error."""
    return {"id": row_id, "error": message}
