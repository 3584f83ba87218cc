"""JSON serialization of responses and server-sent events."""

from __future__ import annotations

import json

# Some clients treat these as line ends of an event, though JSON allows them in a string.
_LINE_ENDS = ("\u2028", "\u2029", "\x85")

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""Serialize a value as compact JSON without ASCII escapes; ValueError for NaN and infinity."""


def event(data: str) -> bytes:
    """Encode JSON data as a server-sent event."""
    if not data.isascii():
        for character in _LINE_ENDS:
            data = data.replace(character, f"\\u{ord(character):04x}")
    return f"data: {data}\n\n".encode()
