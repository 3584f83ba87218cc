"""Parsing of the input lines and formatting of the output lines of a batch job.

A row is in one of two formats: OpenAI's (openai_form.py) or the plain one (plain_form.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, Union

from paddlemix_qwenvl_plugin.batch import openai_form, plain_form
from paddlemix_qwenvl_plugin.batch.request import Reply, RowId, RowRequest
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError, line_of


class Row(NamedTuple):
    """Parsed row of a batch job's input.

    Attributes:
        id: None if the row has no valid id.
        openai: whether the row is in OpenAI's format.
        parsed: the request, or the error of an invalid row.
    """

    id: RowId
    openai: bool
    parsed: Union[RowRequest, QwenVLError]


def read_row(number: int, line: bytes, defaults: Mapping[str, Any]) -> Row:
    """Parse line `number` of the input; if it is invalid, the row's `parsed` is the error.

    Also parses the calibration rows of `qwenvl quantize` (quantization/rows.py).

    Args:
        line: the line's bytes.
        defaults: values of the generation options that the row does not set.
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
    # null equals an omitted key: clients serialize unset fields.
    fields = {name: value for name, value in values.items() if value is not None}
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], RowRequest] = (
        openai_form.read if openai else plain_form.read
    )
    try:
        return Row(row_id, openai, read(fields, defaults))
    except UsageError as error:
        return Row(row_id, openai, error)


def reply_line(row_id: RowId, openai: bool, reply: Reply, tag: str) -> bytes:
    """Format the output line of an answered row; `tag` is the unique request id."""
    values = openai_form.reply(row_id, reply, tag) if openai else plain_form.reply(row_id, reply)
    return dump(values)


def error_line(row_id: RowId, openai: bool, error: QwenVLError, tag: str) -> bytes:
    """Format the output line of a failed row; `tag` as in `reply_line`."""
    message = line_of(error)
    if not openai:
        return dump(plain_form.failure(row_id, message))
    code = "invalid_request" if isinstance(error, UsageError) else "failed"
    return dump(openai_form.failure(row_id, code, message, tag))


def result_id(line: bytes) -> tuple[str, bool] | None:
    """Parse an output line into the row's `id_key` and whether it failed; None if incomplete or not an output line."""
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
    """Serialize an id as a string that distinguishes 1 from "1"."""
    return json.dumps(row_id)


def dump(values: Any) -> bytes:
    """Serialize `values` as a line of JSON in UTF-8."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate can only be written as an escape
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
