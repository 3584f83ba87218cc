"""Text that a terminal shows, and does not obey."""

from __future__ import annotations

import json
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    """`text` with its control characters but new lines and tabs escaped, as in `\\x1b`."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def json_line(values: Any, ensure_ascii: bool) -> str:
    """`values` as a line of JSON in which control characters are escaped, those included that JSON allows."""
    line = json.dumps(values, ensure_ascii=ensure_ascii)
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", line)
