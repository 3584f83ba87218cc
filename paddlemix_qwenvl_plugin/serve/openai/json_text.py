"""JSON as it is sent."""

from __future__ import annotations

import json

# Characters at which some clients break lines of an event, though JSON allows them in a string.
_LINE_ENDS = ("\u2028", "\u2029", "\x85")

dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
"""The shortest JSON of a value, in which text stays text. ValueError for an infinite number."""


def event(data: str) -> bytes:
    """A server-sent event of JSON."""
    if not data.isascii():
        for character in _LINE_ENDS:
            data = data.replace(character, f"\\u{ord(character):04x}")
    return f"data: {data}\n\n".encode()
