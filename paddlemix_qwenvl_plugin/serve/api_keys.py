"""API keys, and the check that a server without keys listens on loopback only, unless `no_auth` is set."""

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
    """Set of API keys, kept in memory as SHA-256 digests only."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def of_file(cls, path: Path) -> ApiKeys:
        """Read a file with one key per line; lines that begin with # are comments.

        Raises:
            UsageError: the file is unreadable or contains no key, or a key has spaces or is not printable ASCII.
        """
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
            mode = path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"--api_key_file {path}: cannot be read ({reason})") from error
        for number, line in enumerate(lines, start=1):
            is_printable_ascii = all("!" <= character <= "~" for character in line)
            if not line.startswith("#") and not is_printable_ascii:
                raise UsageError(f"{path}:{number}: an API key is printable ASCII without spaces")
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError(f"--api_key_file {path}: no key in it; write one on each line")
        if mode & (stat.S_IRGRP | stat.S_IROTH) and not _of_systemd(path):
            log(logging.WARNING, "other users can read the API keys: chmod 600 the file", file=str(path))
        return cls(keys)

    def short_hash(self, key: bytes) -> Optional[str]:
        """Return a key's name in limits and logs, the first 12 hex digits of its digest; None for an unknown key.

        The time does not depend on the key: its digest is compared with every known digest.
        """
        digest = _digest(key)
        known = False
        for known_digest in self._digests:
            known |= hmac.compare_digest(known_digest, digest)
        return digest.hex()[:_HASH_CHARACTERS] if known else None


def read_api_keys(settings: ServeSettings) -> Optional[ApiKeys]:
    """Read the configured API keys; None if requests need no key. Raises as `ApiKeys.of_file`."""
    return None if settings.api_key_file is None else ApiKeys.of_file(settings.api_key_file)


def check_exposure(settings: ServeSettings, address: str, inherited: bool = False) -> None:
    """Refuse a non-loopback address without API keys, unless `no_auth` is set.

    Args:
        address: IP address or host name on which the server listens.
        inherited: whether systemd passed the socket, so that `host` does not apply.

    Raises:
        UsageError: the address is reachable from other machines and no API keys are configured.
    """
    if settings.api_key_file is None and not settings.no_auth and not is_loopback(address):
        source = f"systemd's socket at {address}" if inherited else f"--host {settings.host}"
        raise UsageError(
            f"{source}: other machines could use the server without a key;"
            " give --api_key_file, or --no_auth to let them"
        )


def is_loopback(address: str) -> bool:
    """Whether a host is a loopback IP address or a localhost name."""
    # Without the brackets of an IPv6 address in a URL and without its zone, as in fe80::1%eth0.
    name = address.strip("[]").partition("%")[0].lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _of_systemd(path: Path) -> bool:
    """Whether a file is a systemd credential: the group bits of its mode come from an ACL entry for the service."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and path.is_relative_to(str(folder))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
