"""Download images within limits of size and time, from public addresses unless others are allowed.

Used by processing/images.py, and by the server's ImageHosts, which sends only the messages of TooLargeError to clients
and logs the others.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from typing import Optional, Union

import httpx

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, TooLargeError, UsageError

_CHUNK_BYTES = 64 * 1024
_MAX_REDIRECTS = 5
# NAT64 (RFC 6052): gateways forward these addresses to the IPv4 address in their last 32 bits.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def download(
    url: str,
    name: str,
    max_bytes: int,
    timeout_seconds: float,
    allow_private: bool,
    allows_host: Optional[Callable[[str], bool]] = None,
) -> bytes:
    """Download the body of a URL; `timeout_seconds` bounds the whole call.

    httpx limits only the time of each read, so that a slow server could block the caller forever. A separate thread
    bounds the total time, name resolution included. The environment's proxy is used only with `allow_private`, since a
    proxy connects to addresses that this process cannot check.

    Args:
        name: name of the image in error messages.
        max_bytes: maximum size; a longer body is an error.
        allow_private: also allow addresses that are not public.
        allows_host: returns whether a host, as named by the URL or a redirect, may be contacted; None: any host may.
            Ignored with `allow_private`.

    Raises:
        UsageError: the host, or that of a redirect, is not allowed, or has no public address.
        TooLargeError: the body is longer than `max_bytes`.
        QwenVLError: the download failed or timed out.
    """
    client = httpx.Client(
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=timeout_seconds,
        # No compression: a small body could expand to a large one.
        headers={"Accept-Encoding": "identity"},
        transport=None if allow_private else _PublicTransport(name, allows_host),
    )
    timed_out = QwenVLError(f"image {name}: the download timed out after {timeout_seconds:g} s")
    outcome: list[Union[bytes, BaseException]] = []

    def work() -> None:
        try:
            outcome.append(_fetch(client, url, name, max_bytes))
        except httpx.TimeoutException:
            outcome.append(timed_out)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, socket.gaierror) as error:
            outcome.append(QwenVLError(f"image {name} cannot be downloaded: {error}"))
        except BaseException as error:  # raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work, name="image-download", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    # If the thread is still running, its next read fails.
    client.close()
    result = outcome[0] if outcome else timed_out
    if isinstance(result, BaseException):
        raise result
    return result


def is_public(address: Union[ipaddress.IPv4Address, ipaddress.IPv6Address]) -> bool:
    """Whether an address is public; of an IPv6 address with an embedded IPv4 address, the latter is checked."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(embedded)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class _PublicTransport(httpx.BaseTransport):
    """Transport that resolves a host once and connects only to the checked addresses (no DNS rebinding).

    httpx calls it for each redirect as well.
    """

    def __init__(self, name: str, allows_host: Optional[Callable[[str], bool]]) -> None:
        self._name = name
        self._allows_host = allows_host
        # No keep-alive: httpx pools connections by address, but a connection has verified one host's certificate.
        self._transport = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        if self._allows_host is not None and not self._allows_host(host):
            raise UsageError(f"image {self._name}: host {host} is not allowed")
        entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in entries)
        public = [str(address) for address in addresses if is_public(address)]
        if not public:
            # Only the commands without a list of allowed hosts have the flag.
            advice = ", pass --allow_private_http to allow it" if self._allows_host is None else ""
            raise UsageError(f"image {self._name}: {host} is not at a public address{advice}")
        for address in public[:-1]:
            try:
                return self._connect(request, host, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return self._connect(request, host, public[-1])

    def _connect(self, request: httpx.Request, host: str, address: str) -> httpx.Response:
        """Send `request` to `address`; the Host header and the verified certificate remain those of `host`."""
        return self._transport.handle_request(
            httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},
            )
        )

    def close(self) -> None:
        self._transport.close()


def _fetch(client: httpx.Client, url: str, name: str, max_bytes: int) -> bytes:
    too_large = TooLargeError(f"image {name} is larger than the limit of {max_bytes / 2**20:g} MiB")
    with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise QwenVLError(f"image {name}: the server answered with status {response.status_code}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise QwenVLError(f"image {name}: the server compressed it, which the request did not accept")
        declared = response.headers.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,18}", declared) and int(declared) > max_bytes:
            raise too_large
        body = bytearray()
        for chunk in response.iter_raw(_CHUNK_BYTES):
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)
