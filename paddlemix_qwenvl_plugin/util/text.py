"""Text without terminal control characters."""

from __future__ import annotations

import json
import re
from typing import Any

# ASCII and Latin-1 control characters, except tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    r"""Escape control characters other than line feeds and tabs, as in `\x1b`."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def json_line(values: Any, ensure_ascii: bool) -> str:
    """Format `values` as one line of JSON; control characters that JSON allows unescaped are escaped as well."""
    line = json.dumps(values, ensure_ascii=ensure_ascii)
    return _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", line)
