"""URL and API key of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Optional
from urllib.parse import urlsplit

import httpx

from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.sources import without_password


def check_url(url: str) -> str:
    """Normalize a server's base URL: remove `/`, `/v1` or `/v1/` at its end.

    Raises:
        UsageError: it is not an http(s) URL, or has a query, a fragment, or a user name or password, which the process
            list would show to other users.
    """
    try:
        parts = urlsplit(url)
        host, scheme, _ = parts.hostname, parts.scheme.lower(), parts.port
        _ = httpx.URL(url).host  # stricter than urlsplit: refuses http://[::1]x and invalid host names
    except (ValueError, httpx.InvalidURL):  # such as an invalid IPv6 address or port
        host, scheme = None, ""
    if scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise UsageError(f"--url {without_password(url)}: must be of the form http://host:8000")
    if "@" in parts.netloc:
        raise UsageError(
            f"--url {without_password(url)}: no password here; give the API key with --api_key_file or "
            f"{env.API_KEY.name}"
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def read_key(file: Optional[Path]) -> Optional[str]:
    """Read the API key from `file`, its first line that is neither empty nor a comment (`#`), or from QWENVL_API_KEY.

    Without a file, the key is the value of QWENVL_API_KEY, or None if that is not set.

    Raises:
        UsageError: the file is unreadable or contains no key, or the key has characters that are not printable ASCII,
            or spaces.
    """
    if file is None:
        key, source = env.API_KEY.read(), env.API_KEY.name
    else:
        key, source = _first_key(file), f"--api_key_file {file}"
    if key is not None and not all("!" <= c <= "~" for c in key):
        raise UsageError(f"{source}: an API key is printable ASCII without spaces")
    return key


def _first_key(file: Path) -> str:
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except OSError as error:
        raise UsageError(f"--api_key_file {file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--api_key_file {file}: is not UTF-8") from error
    for line in lines:
        if line and not line.startswith("#"):
            return line
    raise UsageError(f"--api_key_file {file}: has no key in it")
