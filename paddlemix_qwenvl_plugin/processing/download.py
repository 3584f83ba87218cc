"""Download a picture within limits of bytes and time, and from public addresses only unless told otherwise."""

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
# Whose last 32 bits are an IPv4 address, to which a gateway passes on what is sent there (NAT64, RFC 6052).
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def download(
    url: str,
    name: str,
    max_bytes: int,
    timeout_seconds: float,
    allow_private: bool,
    allows_host: Optional[Callable[[str], bool]] = None,
) -> bytes:
    """The body of `url`, within `timeout_seconds` from the call to the last byte.

    httpx limits each read, so a server that sends a byte now and then would hold us for ever. A thread of its
    own bounds the whole, name resolution included. With `allow_private` a proxy that the environment names is
    used; without it none is, since a proxy connects to addresses that nobody here has seen.

    Args:
        name: what error lines call the picture.
        max_bytes: the most that is read; a longer body is an error.
        allows_host: whether a host, as the URL or a redirect names it, may be asked at all; None: every one. Not looked
            at with `allow_private`.

    Raises:
        UsageError: the host, or that of a redirect, is not allowed, or not at a public address.
        TooLargeError: the body is longer.
        QwenVLError: what is wrong with the answer, or that there was none in time.
    """
    client = httpx.Client(
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=timeout_seconds,
        # Not compressed: a small body must not unfold into a large one.
        headers={"Accept-Encoding": "identity"},
        transport=None if allow_private else _PublicTransport(name, allows_host),
    )
    too_slow = QwenVLError(f"image {name} was not there within {timeout_seconds:g} seconds")
    outcome: list[Union[bytes, BaseException]] = []

    def work() -> None:
        try:
            outcome.append(_fetch(client, url, name, max_bytes))
        except httpx.TimeoutException:
            outcome.append(too_slow)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, socket.gaierror) as error:
            outcome.append(QwenVLError(f"image {name} cannot be downloaded: {error}"))
        except BaseException as error:  # raised again in the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=work, name="image-download", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    # Ends the thread's next read if it is still at work.
    client.close()
    result = outcome[0] if outcome else too_slow
    if isinstance(result, BaseException):
        raise result
    return result


def is_public(address: Union[ipaddress.IPv4Address, ipaddress.IPv6Address]) -> bool:
    """Whether an address is one of the internet's, also behind the IPv4 address that an IPv6 address carries."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(carried)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class _PublicTransport(httpx.BaseTransport):
    """Resolves a host once, and connects to the addresses that were checked: no second answer can differ.

    httpx asks it for every redirect anew.
    """

    def __init__(self, name: str, allows_host: Optional[Callable[[str], bool]]) -> None:
        self._name = name
        self._allows_host = allows_host
        # A connection is not used again: it is found by its address, and has shown one host's certificate.
        self._transport = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        if self._allows_host is not None and not self._allows_host(host):
            raise UsageError(f"image {self._name}: host {host} is not allowed")
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        addresses = dict.fromkeys(ipaddress.ip_address(entry[4][0]) for entry in found)
        public = [str(address) for address in addresses if is_public(address)]
        if not public:
            raise UsageError(
                f"image {self._name}: {host} is not at a public address, pass --allow_private_http to allow it"
            )
        for address in public[:-1]:
            try:
                return self._connect(request, host, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return self._connect(request, host, public[-1])

    def _connect(self, request: httpx.Request, host: str, address: str) -> httpx.Response:
        """Send `request` to `address`; its Host header and the certificate that is asked for stay the host's."""
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
            raise QwenVLError(f"image {name}: the server sent it compressed though asked not to")
        declared = response.headers.get("Content-Length", "")
        if re.fullmatch("[0-9]{1,18}", declared) and int(declared) > max_bytes:
            raise too_large
        body = bytearray()
        for chunk in response.iter_raw(_CHUNK_BYTES):
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)
