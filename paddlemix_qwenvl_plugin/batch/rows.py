"""One line of a batch file: what it asks, and the line that answers it.

A row is in one of two forms: OpenAI's (openai_form.py) or the plain one (plain_form.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, Union

from paddlemix_qwenvl_plugin.batch import openai_form, plain_form
from paddlemix_qwenvl_plugin.batch.request import Asked, Reply, RowId
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of


class Row(NamedTuple):
    """A row of the input; `id` is None where the row has none that can be read."""

    id: RowId
    openai: bool
    asked: Union[Asked, UsageError]


def read_row(number: int, line: bytes, defaults: Mapping[str, Any]) -> Row:
    """Read line `number`; what is wrong with it becomes the row's `asked`.

    Args:
        line: the line's bytes.
        defaults: generation options that hold where the row has none of its own.
    """
    try:
        values = _parse(line)
    except UsageError as error:
        openai = any(f'"{key}"'.encode() in line for key in openai_form.MARKS)
        return Row(None, openai, UsageError(f"line {number}: {error}"))
    openai = any(key in values for key in openai_form.MARKS)
    key = "custom_id" if openai else "id"
    row_id = values.get(key)
    if not isinstance(row_id, str) and (openai or type(row_id) is not int):
        kind = "a string" if openai else "a string or a whole number"
        return Row(None, openai, UsageError(f"line {number}: {key} must be {kind}"))
    # A key that is null counts as one that is not there: clients write out what they leave unset.
    given = {name: value for name, value in values.items() if value is not None}
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Asked] = (
        openai_form.read if openai else plain_form.read
    )
    try:
        return Row(row_id, openai, read(given, defaults))
    except UsageError as error:
        return Row(row_id, openai, error)


def reply_line(row_id: RowId, openai: bool, reply: Reply, tag: str) -> bytes:
    """The output line of a row that was answered; `tag` is a name for the request, unlike any other's."""
    form = openai_form.reply(row_id, reply, tag) if openai else plain_form.reply(row_id, reply)
    return dump(form)


def error_line(row_id: RowId, openai: bool, error: QwenVLError, tag: str) -> bytes:
    """The output line of a row that failed."""
    message = line_of(error)
    if not openai:
        return dump(plain_form.failure(row_id, message))
    code = "invalid_request" if isinstance(error, UsageError) else "failed"
    return dump(openai_form.failure(row_id, code, message, tag))


def result_id(line: bytes) -> tuple[str, bool] | None:
    """The `id_key` of the row that an output line answers and whether it failed; None: not a whole output line."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = _parse(line)
    except UsageError:
        return None
    if {"custom_id", "response", "error"} <= set(values):
        return id_key(values["custom_id"]), values["error"] is not None
    if "id" in values and ("text" in values or "error" in values):
        return id_key(values["id"]), "error" in values
    return None


def id_key(row_id: RowId) -> str:
    """An id as a text that tells 1 from "1"."""
    return json.dumps(row_id)


def dump(values: Any) -> bytes:
    """`values` as a line of JSON in UTF-8."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair can only be written as an escape
        return json.dumps(values).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UsageError("must be a JSON object")
    return values


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
