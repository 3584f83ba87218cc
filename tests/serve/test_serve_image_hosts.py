"""Images by URL: only from allowed hosts with public addresses; errors reveal nothing about other hosts."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_network import FakeNetwork

from paddlemix_qwenvl_plugin.serve import image_hosts
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.image_hosts import ImageHosts
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.service import LoadedImage
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

# 960 x 640 pixels.
STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
PUBLIC, UNREACHABLE = "93.184.215.14", "93.184.215.15"
PARAM = "messages[0].content[0].image_url.url"
# Host -> addresses of each DNS lookup; further lookups repeat the last one.
DNS = {
    "images.example": [[PUBLIC]],
    "a.cdn.example": [[PUBLIC]],
    "other.example": [[PUBLIC]],
    "inside.example": [["10.1.2.3"]],
    "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
    "dead.example": [[UNREACHABLE]],
    "nowhere.example": [[]],
}
ALLOWED_HOSTS = [
    *("images.example", "*.cdn.example", "inside.example", "rebinding.example", "dead.example"),
    *("127.0.0.1", "nowhere.example", "[::1]"),
]


class Handler(BaseHTTPRequestHandler):
    """Image server for tests of downloads; every path that is not listed here is an image.

    /to/URL redirects; /status/N is an image with status N; /slow is an image, sent when the test allows it; /text is
    not an image; /large is 1 MiB of zeros.
    """

    def do_GET(self) -> None:
        server: Any = self.server
        server.requests.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
        if self.path == "/slow":
            server.waiting.release()
            server.release.wait(60)
        target = self.path.partition("/to/")[2]
        status = int(self.path.partition("?")[0].partition("/status/")[2] or 200)
        self.send_response(302 if target else status)
        if target:
            self.send_header("Location", target)
        self.end_headers()
        if self.path == "/text":
            self.wfile.write(b"not an image")
        elif self.path == "/large":
            self.wfile.write(bytes(2**20))
        elif not target:
            self.wfile.write(STREET.read_bytes())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    """Image server; `requests` lists HOST/PATH of all requests.

    Requests of /slow release the semaphore `waiting` and wait until `release` is set.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = True
        http_server.block_on_close = False
        state: Any = http_server
        state.requests, state.waiting, state.release = [], threading.Semaphore(0), threading.Event()
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield http_server
        state.release.set()
        http_server.shutdown()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    """Name resolution from the dict DNS; connections to public addresses, except UNREACHABLE, reach this machine."""
    net = FakeNetwork(monkeypatch, {name: [*lookups] for name, lookups in DNS.items()})
    net.refusing_addresses = {UNREACHABLE}
    return net


def settings(**values: Any) -> ServeSettings:
    return ServeSettings(**{"image_hosts": ALLOWED_HOSTS, "image_timeout": 30, "image_workers": 1, **values})


def fetch(url: str, hosts: list[str] = ALLOWED_HOSTS, max_bytes: int = 2**19, seconds: float = 30) -> bytes:
    return asyncio.run(ImageHosts(hosts, max_bytes, seconds).fetch(url, PARAM))


def error_of(call: Callable[[], Any]) -> ApiError:
    """The error of a call, which must have status 400."""
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.param) == (400, PARAM)
    assert str(caught.value).startswith(f"{PARAM}: ")
    return caught.value


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("images.example", True),
        ("IMAGES.example.", True),
        ("a.images.example", False),
        ("example", False),
        ("a.cdn.example", True),
        ("a.b.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        ("xn--bcher-kva.example", True),
        ("bücher.example", True),
        ("a.xn--bcher-kva.example", False),
        ("a.xn--mnchen-3ya.example", True),
        ("127.0.0.1", False),
        ("", False),
    ],
)
def test_host_patterns(host: str, allowed: bool) -> None:
    hosts = ["Images.Example", "*.cdn.example", "bücher.example", "*.münchen.example"]
    assert ImageHosts(hosts, 1, 1).allows(host) is allowed


def test_allowed_hosts(server: Any, net: FakeNetwork) -> None:
    async def load(url: str) -> LoadedImage:
        loader = WorkerImageLoader(settings(), 224)
        try:
            return await loader.load(url, PARAM)
        finally:
            await loader.close()

    for host in ("images.example", "a.cdn.example"):
        assert asyncio.run(load(f"http://{host}:{server.server_port}/a.png")).size == (960, 640)
    assert server.requests == ["images.example/a.png", "a.cdn.example/a.png"]
    error = error_of(lambda: asyncio.run(load(f"http://images.example:{server.server_port}/text")))
    assert error.code == "invalid_image"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example:{port}/a.png",
        "http://images.example@other.example:{port}/a.png",
        "http://images.example.other.example/a.png",
        "http://other.example#images.example",
        f"http://{PUBLIC}/a.png",
        "http://2130706433/a.png",
        "http:///a.png",
    ],
)
def test_host_that_is_not_allowed_is_not_contacted(server: Any, net: FakeNetwork, url: str) -> None:
    error = error_of(lambda: fetch(url.format(port=server.server_port)))
    assert error.code in ("image_host_not_allowed", "invalid_image_url")
    assert (net.resolved_names, net.connected_addresses, server.requests) == ([], [], [])


def test_no_downloads_without_allowed_hosts(server: Any, net: FakeNetwork) -> None:
    error = error_of(lambda: fetch("http://images.example/a.png", hosts=[]))
    assert error.code == "image_host_not_allowed"
    assert "send the image as a data: URL" in str(error)
    assert net.resolved_names == []


@pytest.mark.parametrize(
    ("url", "n_requests", "reason"),
    [
        ("http://images.example:{port}/status/404", 1, "status 404"),
        ("http://images.example:{port}/status/500", 1, "status 500"),
        (
            "http://images.example:{port}/to/http://other.example:{port}/a.png",
            1,
            "host other.example is not allowed",
        ),
        # The next two redirect to hosts that are allowed, but not at public addresses.
        (
            "http://images.example:{port}/to/http://inside.example/a.png",
            1,
            "inside.example is not at a public address",
        ),
        (
            "http://images.example:{port}/to/http://127.0.0.1:{port}/a.png",
            1,
            "127.0.0.1 is not at a public address",
        ),
        ("http://images.example:{port}/to/file:///etc/passwd", 1, "unsupported protocol 'file://'"),
        ("http://inside.example/a.png", 0, "inside.example is not at a public address"),
        ("http://127.0.0.1:{port}/a.png", 0, "127.0.0.1 is not at a public address"),
        ("http://[::1]:{port}/a.png", 0, "::1 is not at a public address"),
        ("http://dead.example/a.png", 0, "does not answer"),
        ("http://nowhere.example/a.png", 0, "not known"),
    ],
)
def test_all_failures_have_the_same_message(
    server: Any, net: FakeNetwork, caplog: pytest.LogCaptureFixture, url: str, n_requests: int, reason: str
) -> None:
    """The message has no reason, which would tell what the server's network contains; the log has it."""
    caplog.set_level(logging.INFO)
    url = url.format(port=server.server_port)
    error = error_of(lambda: fetch(f"{url}?secret"))
    host = url.split("/")[2].partition(f":{server.server_port}")[0].strip("[]")
    assert str(error) == (
        f"{PARAM}: the image cannot be downloaded from {host} within 30 seconds; "
        "check the URL, or send the image as a data: URL"
    )
    assert error.code == "image_download_failed"
    assert len(server.requests) == n_requests
    (line,) = (line for line in caplog.messages if line.startswith("image not downloaded: "))
    assert reason in line
    assert "--allow" not in line  # a flag of other commands
    assert "secret" not in caplog.text


def test_up_to_five_redirects_between_allowed_hosts(server: Any, net: FakeNetwork) -> None:
    base = f"http://images.example:{server.server_port}"
    assert fetch(f"{base}/to/http://a.cdn.example:{server.server_port}/b.png") == STREET.read_bytes()
    assert fetch(base + f"/to/{base}" * 5 + "/c.png") == STREET.read_bytes()
    assert error_of(lambda: fetch(base + f"/to/{base}" * 6 + "/c.png")).code == "image_download_failed"


def test_dns_rebinding(server: Any, net: FakeNetwork) -> None:
    """The name has a public address at the first lookup, and a local one at the second.

    A download makes only one lookup, so that it connects to the address that it has checked.
    """
    url = f"http://rebinding.example:{server.server_port}/a.png"
    assert fetch(url) == STREET.read_bytes()
    assert (net.resolved_names, net.connected_addresses) == (["rebinding.example"], [PUBLIC])
    assert error_of(lambda: fetch(url)).code == "image_download_failed"
    assert net.connected_addresses == [PUBLIC]


def test_size_limit_and_timeout(server: Any, net: FakeNetwork) -> None:
    base = f"http://images.example:{server.server_port}"
    error = error_of(lambda: fetch(f"{base}/large"))
    assert (error.code, "larger than the limit of 0.5 MiB" in str(error)) == ("image_too_large", True)
    error = error_of(lambda: fetch(f"{base}/slow", seconds=0.2))
    assert error.code == "image_download_failed"
    assert "within 0.2 seconds" in str(error)


def test_slow_downloads_do_not_delay_other_images(
    server: Any, net: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While three of five downloads run and two wait, the only image process decodes the image of a data: URL."""
    monkeypatch.setattr(image_hosts, "_MAX_DOWNLOADS", 3)
    from base64 import b64encode

    async def load() -> None:
        loader = WorkerImageLoader(settings(), 224)
        slow = f"http://images.example:{server.server_port}/slow"
        downloads = [asyncio.ensure_future(loader.load(slow, PARAM)) for _ in range(5)]
        for _ in range(3):
            assert await asyncio.to_thread(server.waiting.acquire, timeout=60)
        url = "data:image/png;base64," + b64encode(STREET.read_bytes()).decode()
        assert (await loader.load(url, PARAM)).size == (960, 640)
        assert not any(task.done() for task in downloads)
        assert len(server.requests) == 3
        downloads.pop().cancel()  # a waiting download
        downloads.pop(0).cancel()  # a running download, which counts as running until its thread ends
        server.release.set()
        assert [image.size for image in await asyncio.gather(*downloads)] == [(960, 640)] * 3
        await loader.close()

    asyncio.run(load())
