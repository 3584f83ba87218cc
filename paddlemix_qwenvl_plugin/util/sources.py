"""Where something comes from, as a user names it: a path or an address."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(data|https?):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_address(source: str) -> bool:
    """Whether `source` is a URL, a `data:` URL included, and no path."""
    return _ADDRESS.match(source) is not None


def is_data_url(source: str) -> bool:
    """Whether `source` holds its bytes itself."""
    return source[:5].lower() == "data:"


def without_password(source: str) -> str:
    """`source` without the user and password that a URL may have before its host."""
    return re.sub(r"^(\w[\w+.-]*://)[^/?#]*@", r"\1", source)
