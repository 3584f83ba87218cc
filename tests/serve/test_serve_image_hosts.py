"""Images by URL: allowed hosts at public addresses only; errors reveal nothing about others."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from made_up_net import MadeUpNet

from paddlemix_qwenvl_plugin.serve import image_hosts
from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.image_hosts import ImageHosts
from paddlemix_qwenvl_plugin.serve.images import WorkerImageLoader
from paddlemix_qwenvl_plugin.serve.service import LoadedImage
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

STREET = Path(__file__).resolve().parents[2] / "recipes" / "images" / "street.png"
PUBLIC = "93.184.215.14"
PARAM = "messages[0].content[0].image_url.url"
NET = {
    "images.example": [[PUBLIC]],
    "a.cdn.example": [[PUBLIC]],
    "other.example": [[PUBLIC]],
    "inside.example": [["10.1.2.3"]],
    "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
    "dead.example": [["93.184.215.15"]],
}
HOSTS = [
    *("images.example", "*.cdn.example", "inside.example", "rebinding.example", "dead.example"),
    *("127.0.0.1", "nowhere.example", "[::1]"),
]


class Handler(BaseHTTPRequestHandler):
    """/to/URL redirects; /status/N responds with status N; /slow waits for the test; other paths are an image."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
        if self.path == "/slow":
            server.waiting.release()
            server.go_on.wait(60)
        target = self.path.partition("/to/")[2]
        status = int(self.path.partition("/status/")[2] or 200)
        self.send_response(302 if target else status)
        if target:
            self.send_header("Location", target)
        self.end_headers()
        if self.path == "/text":
            self.wfile.write(b"no image")
        elif self.path == "/large":
            self.wfile.write(bytes(2**20))
        elif not target:
            self.wfile.write(STREET.read_bytes())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads = True
        http_server.block_on_close = False
        made: Any = http_server
        made.asked, made.waiting, made.go_on = [], threading.Semaphore(0), threading.Event()
        threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
        yield http_server
        made.go_on.set()
        http_server.shutdown()


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> MadeUpNet:
    made = MadeUpNet(monkeypatch, {name: [*answers] for name, answers in NET.items()})
    made.dead = {"93.184.215.15"}
    return made


def settings(**values: Any) -> ServeSettings:
    return ServeSettings(**{"image_hosts": HOSTS, "image_timeout": 30, "image_workers": 1, **values})


def fetched(url: str, hosts: list[str] = HOSTS, max_bytes: int = 2**19, seconds: float = 30) -> bytes:
    return asyncio.run(ImageHosts(hosts, max_bytes, seconds).fetch(url, PARAM))


def refusal(call: Callable[[], Any]) -> ApiError:
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
def test_allow_list(host: str, allowed: bool) -> None:
    hosts = ["Images.Example", "*.cdn.example", "bücher.example", "*.münchen.example"]
    assert ImageHosts(hosts, 1, 1).allows(host) is allowed


def test_load(server: Any, net: MadeUpNet) -> None:
    async def load(url: str) -> LoadedImage:
        loader = WorkerImageLoader(settings(), 224)
        try:
            return await loader.load(url, PARAM)
        finally:
            await loader.close()

    for host in ("images.example", "a.cdn.example"):
        assert asyncio.run(load(f"http://{host}:{server.server_port}/a.png")).size == (960, 640)
    assert server.asked == ["images.example/a.png", "a.cdn.example/a.png"]
    error = refusal(lambda: asyncio.run(load(f"http://images.example:{server.server_port}/text")))
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
def test_hosts_that_are_not_listed(server: Any, net: MadeUpNet, url: str) -> None:
    error = refusal(lambda: fetched(url.format(port=server.server_port)))
    assert error.code in ("image_host_not_allowed", "invalid_image_url")
    assert (net.asked, net.reached, server.asked) == ([], [], [])


def test_downloads_are_off_without_a_list(server: Any, net: MadeUpNet) -> None:
    error = refusal(lambda: fetched("http://images.example/a.png", hosts=[]))
    assert error.code == "image_host_not_allowed"
    assert "send the image as a data: URL" in str(error)
    assert net.asked == []


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://images.example:{port}/status/404", 1),
        ("http://images.example:{port}/status/500", 1),
        ("http://images.example:{port}/to/http://other.example:{port}/a.png", 1),  # off the list
        ("http://images.example:{port}/to/http://inside.example/a.png", 1),  # listed, but not public
        ("http://images.example:{port}/to/http://127.0.0.1:{port}/a.png", 1),
        ("http://images.example:{port}/to/file:///etc/passwd", 1),
        ("http://inside.example/a.png", 0),
        ("http://127.0.0.1:{port}/a.png", 0),
        ("http://[::1]:{port}/a.png", 0),
        ("http://dead.example/a.png", 0),
        ("http://nowhere.example/a.png", 0),
    ],
)
def test_all_failures_look_alike(
    server: Any, net: MadeUpNet, caplog: pytest.LogCaptureFixture, url: str, asked: int
) -> None:
    caplog.set_level(logging.INFO)
    url = url.format(port=server.server_port)
    error = refusal(lambda: fetched(f"{url}?secret"))
    host = url.split("/")[2].partition(f":{server.server_port}")[0].strip("[]")
    assert str(error) == (
        f"{PARAM}: the image cannot be downloaded from {host} within 30 seconds; "
        "check the URL, or send the image as a data: URL"
    )
    assert error.code == "image_download_failed"
    assert len(server.asked) == asked
    assert "image not downloaded: " in caplog.text
    assert "secret" not in caplog.text


def test_redirects_within_the_list_are_followed_a_few_times(server: Any, net: MadeUpNet) -> None:
    base = f"http://images.example:{server.server_port}"
    assert fetched(f"{base}/to/http://a.cdn.example:{server.server_port}/b.png") == STREET.read_bytes()
    assert fetched(base + f"/to/{base}" * 5 + "/c.png") == STREET.read_bytes()
    assert refusal(lambda: fetched(base + f"/to/{base}" * 6 + "/c.png")).code == "image_download_failed"


def test_rebinding(server: Any, net: MadeUpNet) -> None:
    """DNS rebinding: a name that is public when checked and local when resolved again."""
    url = f"http://rebinding.example:{server.server_port}/a.png"
    assert fetched(url) == STREET.read_bytes()
    assert (net.asked, net.reached) == (["rebinding.example"], [PUBLIC])
    assert refusal(lambda: fetched(url)).code == "image_download_failed"
    assert net.reached == [PUBLIC]


def test_limits(server: Any, net: MadeUpNet) -> None:
    base = f"http://images.example:{server.server_port}"
    error = refusal(lambda: fetched(f"{base}/large"))
    assert (error.code, "larger than the limit of 0.5 MiB" in str(error)) == ("image_too_large", True)
    error = refusal(lambda: fetched(f"{base}/slow", seconds=0.2))
    assert error.code == "image_download_failed"
    assert "within 0.2 seconds" in str(error)


def test_slow_hosts_do_not_stop_the_decoders(
    server: Any, net: MadeUpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More downloads than decoders and than the limit of concurrent downloads; the others wait."""
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
        assert len(server.asked) == 3
        downloads.pop().cancel()  # one that waits
        downloads.pop(0).cancel()  # one at work, which keeps its place until it ends
        server.go_on.set()
        assert [image.size for image in await asyncio.gather(*downloads)] == [(960, 640)] * 3
        await loader.close()

    asyncio.run(load())
