"""Where a server is, and the key that it wants."""

from __future__ import annotations

from pathlib import Path
from typing import Optional
from urllib.parse import urlsplit

from paddlemix_qwenvl_plugin.util import env
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.sources import without_password


def check_url(url: str) -> str:
    """The address below which a server's endpoints are, from what a user gave: with or without `/` or `/v1` behind it.

    Raises:
        UsageError: it is none, or has a password in it, which others would see in the list of processes.
    """
    try:
        parts = urlsplit(url)
        host, scheme, _ = parts.hostname, parts.scheme.lower(), parts.port
    except ValueError:  # a broken IPv6 address or port
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
    """The API key: the first one of a file with a key on each line, else that of the environment, if there is one.

    Raises:
        UsageError: the file cannot be read or has no key, or the key is one that no header can carry.
    """
    if file is None:
        key, where = env.API_KEY.read(), env.API_KEY.name
    else:
        key, where = _first_key(file), f"--api_key_file {file}"
    if key is not None and not all("!" <= c <= "~" for c in key):
        raise UsageError(f"{where}: an API key is printable ASCII without spaces")
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
