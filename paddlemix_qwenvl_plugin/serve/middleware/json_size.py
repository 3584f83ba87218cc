"""Bound on the parsing cost of a JSON body, checked before parsing, which blocks the event loop."""

from __future__ import annotations

from paddlemix_qwenvl_plugin.serve.errors import ApiError

_MAX_QUOTES = 2**17  # two for each string, and one for each escaped quotation mark
_MAX_BYTES_OUTSIDE_STRINGS = 2**20  # 8 prompts of 8191 token ids, the most by default, take half of it


def check_size(body: bytes) -> None:
    """Raise ApiError if parsing the body would be expensive.

    An image is one long string and cheap to parse. The cost grows with the number of strings and with the bytes outside
    of strings: lists, objects, numbers. 32 MB of lists take 6 s and 1 GB to parse, and 0.04 s to check here.
    """
    if body.count(b'"') > _MAX_QUOTES:
        raise _too_large(f"{_MAX_QUOTES} quotation marks")
    if b"\\" in body:  # escaped quotation marks do not end a string
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # The parts between quotation marks are alternately outside and inside of a string.
    outside_strings = body.split(b'"')[::2]
    if sum(map(len, outside_strings)) > _MAX_BYTES_OUTSIDE_STRINGS:
        raise _too_large(f"{_MAX_BYTES_OUTSIDE_STRINGS} bytes outside of strings")


def _too_large(limit: str) -> ApiError:
    return ApiError(413, f"The body has more than {limit}, which no prompt needs", code="request_too_large")
