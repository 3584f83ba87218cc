"""Sources named by a user: paths and URLs."""

from __future__ import annotations

import re

# A data: or http(s): URL, or SCHEME://.
_ADDRESS = re.compile(r"(data|https?):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_address(source: str) -> bool:
    """Whether `source` is a URL (`data:` URLs included) rather than a path."""
    return _ADDRESS.match(source) is not None


def is_data_url(source: str) -> bool:
    """Whether `source` is a `data:` URL."""
    return source[:5].lower() == "data:"


def without_password(source: str) -> str:
    """Remove user name and password from a URL; a source without them is returned unchanged."""
    return re.sub(r"^(\w[\w+.-]*://)[^/?#]*@", r"\1", source)
