"""How much work the JSON of a body is for its parser, which holds up the event loop: bounded before it is parsed."""

from __future__ import annotations

from paddlemix_qwenvl_plugin.serve.errors import ApiError

_MOST_QUOTES = 2**17
_MOST_OUTSIDE = 2**20  # 8 prompts of 8191 token ids are half of it


def check_size(body: bytes) -> None:
    """Raise ApiError unless this is soon parsed.

    An image is one long string, which costs next to nothing; what costs is the number of strings, and what lies outside
    of them: lists, objects, numbers. 32 MB of lists take 6 s and 1 GB to parse, and 0.04 s to be seen here.
    """
    if body.count(b'"') > _MOST_QUOTES:
        raise _too_large(f"{_MOST_QUOTES} quotation marks")
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if sum(map(len, body.split(b'"')[::2])) > _MOST_OUTSIDE:
        raise _too_large(f"{_MOST_OUTSIDE} bytes outside of strings")


def _too_large(limit: str) -> ApiError:
    return ApiError(413, f"The body has more than {limit}, which no prompt needs", code="request_too_large")
