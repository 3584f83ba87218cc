"""Images are downloaded only from public addresses by default. An address is checked when it is connected to."""

from __future__ import annotations

import io
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from fake_network import FakeNetwork
from PIL import Image

from paddlemix_qwenvl_plugin.processing.download import is_public
from paddlemix_qwenvl_plugin.processing.images import ImageLimits, load_image
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
REFUSED = "is not at a public address, pass --allow_private_http to allow it"


class Handler(BaseHTTPRequestHandler):
    """Redirect /to/URL to URL, answer all other paths with an image, and record the Host header of each request."""

    protocol_version = "HTTP/1.1"  # keeps connections open, so a client could reuse one

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4), "#c86432").save(buffer, "PNG")
        target = self.path.partition("/to/")[2]
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        body = b"" if target else buffer.getvalue()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # with allow_private, the environment's proxy would be used
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = True
        http_server.block_on_close = False
        http_server.hosts = []  # type: ignore[attr-defined]
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield http_server
        http_server.shutdown()


def hosts(server: ThreadingHTTPServer) -> list[str]:
    return server.hosts  # type: ignore[attr-defined, no-any-return]


load = partial(load_image, allow_http=True)


@pytest.mark.parametrize(
    "host",
    [
        # 127.0.0.1 in decimal, hexadecimal and octal notation, and with fewer parts.
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        # The unspecified address, which connects to this machine.
        "0",
        "0.0.0.0",
        # IPv6, IPv4 in IPv6, and the name.
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
    ],
)
def test_spellings_of_this_machine_are_refused(server: ThreadingHTTPServer, host: str) -> None:
    # httpx itself refuses 0177.0.0.1 as an invalid address.
    with pytest.raises(QwenVLError, match=f"{REFUSED}|Invalid IPv4 address"):
        load(f"http://{host}:{server.server_port}/a.png")
    assert hosts(server) == []


@pytest.mark.parametrize(
    "address",
    [
        # Private, link-local (cloud metadata), carrier-grade NAT, benchmarking, documentation.
        *(
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "192.0.2.1",
        ),
        # Unspecified, loopback, multicast, reserved, broadcast.
        *("0.0.0.0", "127.0.0.53", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        # Such addresses in IPv6.
        *(
            "::",
            "::1",
            "fe80::1",
            "fe80::1%1",
            "fc00::1",
            "fd00:ec2::254",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
        ),
        # IPv4 in IPv6: mapped, compatible, NAT64, 6to4, Teredo.
        *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "2002:a00:1::1", "2001:0:7f00:1::"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [PUBLIC, OTHER_PUBLIC, "8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "172.32.0.1"],
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_a_private_address_can_be_allowed(server: ThreadingHTTPServer) -> None:
    url = f"http://127.0.0.1:{server.server_port}/a.png"
    assert load(url, limits=ImageLimits(allow_private=True)).size == (6, 4)


def test_a_public_name(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    net = FakeNetwork(monkeypatch, {"images.example": [[PUBLIC]]})
    assert load(f"http://images.example:{server.server_port}/a.png").size == (6, 4)
    assert (net.resolved_names, net.connected_addresses) == (["images.example"], [PUBLIC])
    assert hosts(server) == [f"images.example:{server.server_port}"]


def test_the_next_address_is_tried(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that are not public are skipped."""
    net = FakeNetwork(monkeypatch, {"images.example": [["10.0.0.1", OTHER_PUBLIC, PUBLIC]]})
    net.refusing_addresses = {OTHER_PUBLIC}
    url = f"http://images.example:{server.server_port}/a.png"
    assert load(url).size == (6, 4)
    assert net.connected_addresses == [OTHER_PUBLIC, PUBLIC]
    net.refusing_addresses = {OTHER_PUBLIC, PUBLIC}
    with pytest.raises(QwenVLError, match="cannot be downloaded"):
        load(url)


def test_dns_rebinding(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name resolves to a public address at first, then to this machine: a request makes only one query."""
    net = FakeNetwork(monkeypatch, {"rebinding.example": [[PUBLIC], ["127.0.0.1"]]})
    assert load(f"http://rebinding.example:{server.server_port}/a.png").size == (6, 4)
    assert (net.resolved_names, net.connected_addresses) == (["rebinding.example"], [PUBLIC])
    with pytest.raises(UsageError, match=f"rebinding.example {REFUSED}"):
        load(f"http://rebinding.example:{server.server_port}/a.png")
    assert net.connected_addresses == [PUBLIC]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/a.png", "http://2130706433:{port}/a.png", "http://inside.example/"]
)
def test_redirect_to_a_private_address(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    net = FakeNetwork(monkeypatch, {"images.example": [[PUBLIC]], "inside.example": [["10.1.2.3"]]})
    # Two redirects: to another path of the public name, then to `target`.
    public = f"http://images.example:{server.server_port}"
    url = f"{public}/to/{public}/to/{target.format(port=server.server_port)}"
    with pytest.raises(UsageError, match=REFUSED):
        load(url)
    assert net.connected_addresses == [PUBLIC, PUBLIC]
    assert len(hosts(server)) == 2


def test_proxies_of_the_environment_are_ignored(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would connect to unchecked addresses. The proxy of this test is the server itself."""
    net = FakeNetwork(monkeypatch, {"images.example": [[PUBLIC]]})
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{server.server_port}")
    assert load(f"http://images.example:{server.server_port}/a.png").size == (6, 4)
    assert net.connected_addresses == [PUBLIC]


def test_the_certificate_is_checked_by_host_name(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TLS sends the host name, and a certificate of another host at the same address is refused."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", "subjectAltName=DNS:images.example", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    sent_names: list[Any] = []
    context.sni_callback = lambda connection, name, _: sent_names.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    FakeNetwork(monkeypatch, {name: [[PUBLIC]] for name in ("images.example", "other.example")})
    images, other = (f"https://{name}.example:{server.server_port}" for name in ("images", "other"))
    assert load(f"{images}/a.png").size == (6, 4)
    for url in (f"{other}/a.png", f"{images}/to/{other}/a.png"):
        with pytest.raises(QwenVLError, match=r"cannot be downloaded: .*certificate"):
            load(url)
    assert sent_names == ["images.example", "other.example", "images.example", "other.example"]
