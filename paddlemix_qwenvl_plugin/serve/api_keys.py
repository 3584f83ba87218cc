"""API keys, and who needs one."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.serve.json_log import log
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.util.errors import UsageError

_HASH_CHARACTERS = 12


class ApiKeys:
    """The keys of a file. In memory there are only their hashes."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def of_file(cls, path: Path) -> ApiKeys:
        """Read a key a line; lines that begin with # are comments.

        Raises:
            UsageError: the file cannot be read, has no key, or one that no header can carry.
        """
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"--api_key_file {path}: cannot be read ({reason})") from error
        for number, line in enumerate(lines, start=1):
            if not line.startswith("#") and not all("!" <= c <= "~" for c in line):
                raise UsageError(f"{path}:{number}: an API key is printable ASCII without spaces")
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError(f"--api_key_file {path}: no key in it; write one on each line")
        if mode & (stat.S_IRGRP | stat.S_IROTH) and not _of_systemd(path):
            log(logging.WARNING, "other users can read the API keys: chmod 600 the file", file=str(path))
        return cls(keys)

    def short_hash(self, key: bytes) -> Optional[str]:
        """What limits and logs call a key; None for one that is not of the file.

        Takes the same time for every key: all are compared, and only their hashes.
        """
        digest = _digest(key)
        known = False
        for own in self._digests:
            known |= hmac.compare_digest(own, digest)
        return digest.hex()[:_HASH_CHARACTERS] if known else None


def keys_of(settings: ServeSettings) -> Optional[ApiKeys]:
    """The keys that requests need; None: they need none."""
    return None if settings.api_key_file is None else ApiKeys.of_file(settings.api_key_file)


def check_exposure(settings: ServeSettings, address: str) -> None:
    """Refuse to listen on an address of other machines without API keys, unless that is said out loud.

    Args:
        address: the IP address of the listening socket.

    Raises:
        UsageError
    """
    if settings.api_key_file is None and not settings.no_auth and not is_loopback(address):
        raise UsageError(
            f"--host {settings.host}: other machines could use the server without a key;"
            " give --api_key_file, or --no_auth to let them"
        )


def is_loopback(address: str) -> bool:
    """Whether an IP address, or localhost, is that of this machine only."""
    name = address.strip("[]").partition("%")[0].lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _of_systemd(path: Path) -> bool:
    """Whether a file is a credential of the service: systemd lets its user read it by an ACL, which looks like more."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and path.is_relative_to(str(folder))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
