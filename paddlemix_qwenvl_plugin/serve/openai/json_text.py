"""JSON serialization of responses and server-sent events."""

from __future__ import annotations

import json

# Characters that JSON allows in a string, but that some clients take as the end of an event's line.
_LINE_ENDS = ("\u2028", "\u2029", "\x85")

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""Serialize a value as compact JSON without ASCII escapes; ValueError for NaN and infinity."""


def event(data: str) -> bytes:
    """Encode JSON text or [DONE] as the data of a server-sent event."""
    if not data.isascii():
        for character in _LINE_ENDS:
            data = data.replace(character, f"\\u{ord(character):04x}")
    return f"data: {data}\n\n".encode()
