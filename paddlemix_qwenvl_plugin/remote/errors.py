"""Conversion of a server's errors to exceptions.

In a batch job a RequestError fails only its row, and the request is repeated after a BusyError, until its waits would
exceed ten minutes in total (server.py). That BusyError, or any other exception, ends the job.
"""

from __future__ import annotations

import json
from typing import Any, Optional

import httpx

from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, RequestError, UsageError


class RefusedError(RequestError, UsageError):
    """The server refused the request as invalid.

    Attributes:
        param, code: fields of OpenAI's error object.
    """

    def __init__(self, message: str, param: Optional[str], code: Optional[str]) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BusyError(QwenVLError):
    """The server cannot accept the request now.

    Attributes:
        retry_after: seconds of the response's Retry-After; None without this header, or if it is not a number of
            seconds but, for example, a date.
    """

    def __init__(self, message: str, retry_after: Optional[float]) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def error_of_response(url: str, response: httpx.Response) -> QwenVLError:
    """Convert a fully read response with a status other than 200 to an exception."""
    status = response.status_code
    error = _error_object(response.content)
    message = str(error.get("message") or response.reason_phrase or "no reason given")
    if status in (400, 413, 415, 422):
        return RefusedError(message, error.get("param"), error.get("code"))
    if status == 500:
        return RequestError(f"{url}: {message}")
    if status in (429, 502, 503, 504):
        seconds = _retry_after(response)
        when = "later" if seconds is None else f"in {seconds:g} seconds"
        return BusyError(f"{url}: {message} (status {status}); try again {when}", seconds)
    code = error.get("code")
    if status == 401 or (status == 403 and not code):
        return QwenVLError(f"{url}: {message}; give its API key with --api_key_file or {env.API_KEY.name}")
    # With other codes, such as host_not_allowed and model_not_found, the message says what is wrong.
    if code and code != "not_found":
        return QwenVLError(f"{url}: {message} (status {status})")
    return QwenVLError(
        f"{url}: {message} (status {status}); is it the address of an OpenAI-compatible server?"
    )


def error_of_event(url: str, error: Any) -> QwenVLError:
    """Convert `error`, the error object of an event of a stream, to an exception."""
    fields = error if isinstance(error, dict) else {"message": error}
    message = str(fields.get("message"))
    if fields.get("type") == "invalid_request_error":
        return RefusedError(message, fields.get("param"), fields.get("code"))
    return RequestError(f"{url}: {message}")


def error_of_connection(url: str, error: Exception) -> QwenVLError:
    """Convert an error of httpx to an exception: an invalid URL, no connection, or no complete response."""
    reason = str(error) or type(error).__name__
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return QwenVLError(f"{url}: cannot be reached ({reason}); is the server running there?")
    return QwenVLError(f"{url}: the connection broke ({reason})")


def invalid_response(url: str) -> QwenVLError:
    """Create the error of a response that is not in OpenAI's format."""
    return QwenVLError(f"{url}: the response is not in OpenAI's format; is it an OpenAI-compatible server?")


def _error_object(content: bytes) -> dict[str, Any]:
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {"message": error}


def _retry_after(response: httpx.Response) -> Optional[float]:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
