"""Fake resolver of given names, and fake connections, all of which are to servers on this machine."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest


class FakeNetwork:
    """Patches the resolver and connections. `names` maps a name to its successive resolutions; the last one repeats.

    A resolution without addresses fails as for a name that does not exist.

    Attributes:
        resolved_names: the names that were resolved, in order.
        connected_addresses: the addresses to which a connection was opened or tried, in order.
        refusing_addresses: addresses that refuse connections.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> None:
        self._names = names
        self._lookup = socket.getaddrinfo
        self._connect = socket.create_connection
        self.resolved_names: list[str] = []
        self.connected_addresses: list[str] = []
        self.refusing_addresses: set[str] = set()
        monkeypatch.setattr(socket, "getaddrinfo", self._getaddrinfo)
        monkeypatch.setattr(socket, "create_connection", self._create_connection)

    def _getaddrinfo(self, host: str, *args: Any, **kwargs: Any) -> list[Any]:
        if host not in self._names:
            # Numeric addresses in any spelling, and names that do not exist.
            return self._lookup(host, *args, **kwargs)
        self.resolved_names.append(host)
        answers = self._names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0))
            for ip in addresses
        ]

    def _create_connection(self, address: tuple[str, int], *args: Any, **kwargs: Any) -> socket.socket:
        host, port = address
        if host in self._names:  # connecting by name queries the resolver again
            [(*_, (host, _))] = self._getaddrinfo(host)[:1]
        self.connected_addresses.append(host)
        if host in self.refusing_addresses:
            raise ConnectionRefusedError(f"{host} does not answer")
        # Fail at once on a connection to an address that is not public.
        assert ip_address(host).is_global
        return self._connect(("127.0.0.1", port), *args, **kwargs)
