"""Middleware of the app, health checks and metrics: request ids, logs, limits of bodies, headers, errors."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import mimetypes
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Optional

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_service_helpers import PATH, CountingEngine, fake_app, fake_service, served
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from paddlemix_qwenvl_plugin.serve import json_log
from paddlemix_qwenvl_plugin.serve.metrics import Metrics
from paddlemix_qwenvl_plugin.serve.middleware.body import BodyLimit
from paddlemix_qwenvl_plugin.serve.middleware.request_log import RequestLog
from paddlemix_qwenvl_plugin.serve.service import Service

HOST = "http://127.0.0.1:8000"
MIB = 2**20


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log of the server, one JSON record per line."""
    log = io.StringIO()
    root = logging.getLogger()
    loggers = [root, json_log.LOGGER, logging.getLogger("uvicorn"), logging.getLogger("asyncio")]
    initial_state = root.handlers[:], [logger.level for logger in loggers]
    monkeypatch.setattr("sys.stderr", log)
    json_log.start_logging("debug")
    try:
        yield log
    finally:
        root.handlers[:], levels = initial_state
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        logging.captureWarnings(False)


def plugin_records(log: io.StringIO) -> list[dict[str, Any]]:
    """The records of this package's loggers."""
    records = [json.loads(line) for line in log.getvalue().splitlines()]
    return [record for record in records if record["logger"].startswith("paddlemix_qwenvl_plugin")]


def ready_service(**settings: Any) -> Service:
    engine = CountingEngine()
    engine.ready = True
    return fake_service(engine, **settings)


def send(
    service: Service, method: str, path: str, page: Optional[Path] = None, **request: Any
) -> httpx.Response:
    """Send a request to the app of a service; `page` is the folder of the chat page, `request` are httpx arguments."""
    app = fake_app(service, **({"page": page} if page else {}))

    async def request_app() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST) as client:
            return await client.request(method, path, **request)

    return asyncio.run(request_app())


def test_request_id_and_log_record(log: io.StringIO, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("some-key")
    keys.chmod(0o600)
    service = ready_service(api_key_file=keys)
    headers = {"Authorization": "Bearer some-key"}
    body = {"n_tokens": 5, "comment": "secret"}
    response = send(service, "POST", f"{PATH}?secret=1", json=body, headers=headers)
    assert response.status_code == 200
    (record,) = plugin_records(log)
    assert record.pop("time")
    seconds, key = record.pop("seconds"), record.pop("key")
    assert 0 <= seconds < 60
    assert record == {
        "level": "info",
        "logger": "paddlemix_qwenvl_plugin.serve",
        "event": "request",
        "id": response.headers["X-Request-Id"],
        "method": "POST",
        "path": PATH,
        "status": 200,
        "prompt_tokens": 1,
        "completion_tokens": 5,
    }
    assert len(key) == 12  # the short hash of the API key
    assert "secret" not in log.getvalue()
    assert "some-key" not in log.getvalue()


@pytest.mark.parametrize(
    ("request_id", "valid"),
    [
        ("abc-DEF_1.2:3/4+5=", True),
        ("x" * 100, True),
        ("x" * 101, False),
        ("two words", False),
        ("é", False),
        ('a"b', False),
        ("", False),
    ],
)
def test_request_id_of_a_client_is_used_only_if_valid(request_id: str, valid: bool) -> None:
    header = {"X-Request-Id": request_id.encode("latin-1")}
    responses = [send(ready_service(), "GET", "/health/live", headers=header) for _ in range(2)]
    ids = [response.headers["X-Request-Id"] for response in responses]
    if valid:
        assert ids == [request_id, request_id]
    else:  # the server generates one
        assert request_id not in ids
        assert len({*ids}) == 2
        assert all(len(id_) == 32 for id_ in ids)


def test_exception_is_answered_with_500_and_logged_with_a_traceback(log: io.StringIO) -> None:
    service = ready_service()
    response = send(service, "POST", PATH, json={"raise": "break"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "break" not in response.text
    exception, request = plugin_records(log)
    assert "RuntimeError: requested: break" in exception["traceback"]
    assert exception["id"] == request["id"] == response.headers["X-Request-Id"]
    assert (request["status"], request["error"]) == (500, "internal_error")
    assert 'qwenvl_errors_total{kind="internal_error"} 1.0' in service.metrics.render()[0].decode()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("PUT", PATH, 405, "method_not_allowed"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_unknown_paths_and_methods(method: str, path: str, status: int, code: str) -> None:
    response = send(ready_service(), method, path, json={})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


def test_every_response_has_security_headers(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    responses = [
        (path, send(ready_service(), "GET", path, page=tmp_path))
        for path in ("/", "/app.js", "/health/live", "/nothing", "/metrics")
    ]
    responses.append((PATH, send(ready_service(), "POST", PATH, json={"raise": "break"})))
    assert responses[-1][1].status_code == 500  # the response to an unexpected exception
    for path, response in responses:
        headers = response.headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["frame-ancestors"] == "'none'"
        if path in ("/", "/app.js"):
            assert (policy["default-src"], policy["img-src"]) == ("'self'", "'self' data: blob:")
            assert "unsafe" not in str(policy)
        else:
            assert policy["default-src"] == "'none'"


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimetypes, "_db", mimetypes.MimeTypes())
    mimetypes.add_type("text/plain", ".js")  # Some systems have this wrong type; the server must not use it.
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    types = {"/": "text/html; charset=utf-8", "/app.js": "text/javascript; charset=utf-8"}
    for path, content_type in types.items():
        headers = send(ready_service(), "GET", path, page=tmp_path).headers
        # "no-cache": the browser always checks for a new version, since page and modules must have the same version.
        assert (headers["Content-Type"], headers["Cache-Control"]) == (content_type, "no-cache")
    assert "Cache-Control" not in send(ready_service(), "GET", "/health/live", page=tmp_path).headers
    response = send(ready_service(), "GET", "/", page=tmp_path)
    assert (response.status_code, response.text) == (200, "<p>page</p>")
    conditional = {"If-None-Match": response.headers["ETag"]}
    unchanged = send(ready_service(), "GET", "/", page=tmp_path, headers=conditional)
    assert (unchanged.status_code, unchanged.headers["Cache-Control"]) == (304, "no-cache")
    assert send(ready_service(page=False), "GET", "/", page=tmp_path).status_code == 404
    assert send(ready_service(), "GET", "/", page=tmp_path / "none").status_code == 404


async def _chunks(sizes: list[int]) -> AsyncIterator[bytes]:
    """A JSON body whose string consists of chunks of these sizes."""
    yield b'{"a": "'
    for size in sizes:
        yield b"x" * size
    yield b'"}'


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(MIB - 100, 200), (MIB + 1, 413), (3 * MIB, 413)])
def test_size_limit_of_a_body(size: int, status: int, chunked: bool) -> None:
    """Over a TCP connection: status 413 must reach a client that sends slightly too much."""
    with served(ready_service(max_body_bytes=MIB)) as url:
        body: Any = _chunks([size // 4] * 4) if chunked else b'{"a": "' + b"x" * size + b'"}'

        async def post() -> httpx.Response:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                headers = {"Content-Type": "application/json"}
                return await client.post(PATH, content=body, headers=headers)

        if size > 2 * MIB:
            # The server reads only twice the limit: the client receives the response or a connection reset.
            with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                assert asyncio.run(post()).status_code == 413
            return
        response = asyncio.run(post())
        assert response.status_code == status
        if status == 413:
            error = response.json()["error"]
            assert error["code"] == "request_too_large"
            assert "1048576 bytes" in error["message"]
            assert response.headers["Connection"] == "close"


def test_limit_of_all_bodies_in_memory() -> None:
    """A body counts towards the limit until its request ends."""
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        assert len((await receive())["body"]) == 600_000
        started.set()
        await release.wait()
        await Response("done")(scope, receive, send)

    async def send_requests() -> None:
        limited = BodyLimit(slow, max_bytes=MIB, max_held_bytes=MIB, timeout=60)
        transport = httpx.ASGITransport(app=limited)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def post() -> httpx.Response:
                headers = {"Content-Type": "application/json"}
                return await client.post("/", content=b"x" * 600_000, headers=headers)

            first = asyncio.create_task(post())
            await started.wait()
            second = await asyncio.wait_for(post(), 10)
            assert second.status_code == 429
            assert second.headers["Retry-After"] == "1"
            assert second.json()["error"]["type"] == "rate_limit_error"
            assert limited._held_bytes == 600_000
            release.set()
            assert (await first).text == "done"
            assert limited._held_bytes == 0
            assert (await post()).text == "done"

    asyncio.run(send_requests())


def test_expect_100_continue() -> None:
    """A client that sends "Expect: 100-continue", as curl does for long bodies, gets status 413 before it sends one."""
    with served(ready_service(max_body_bytes=MIB)) as url, connect(url) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Type: application/json"
        connection.sendall(f"{head}\r\nContent-Length: {2 * MIB}\r\n\r\n".encode())
        assert read_to_end(connection).startswith(b"HTTP/1.1 413 ")


def test_body_timeout() -> None:
    with served(ready_service(body_timeout=0.3)) as url, connect(url) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        connection.sendall(f'{head}\r\nContent-Length: 100\r\n\r\n{{"a":'.encode())
        response = read_to_end(connection)
        assert response.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in response


def test_no_warning_of_writes_after_a_disconnect(log: io.StringIO) -> None:
    """Asyncio warns when a program writes five more times after a failed write; the log must not have this warning."""

    async def write() -> None:
        local, peer = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=local)
        peer.close()
        for _ in range(10):
            writer.write(b"data: 1\n\n")
        writer.close()

    asyncio.run(write())
    assert log.getvalue() == ""


def test_client_disconnects_while_sending_its_body(log: io.StringIO) -> None:
    service = ready_service()
    with served(service) as url:
        with connect(url) as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            connection.sendall(f'{head}\r\nContent-Length: 100\r\n\r\n{{"a":'.encode())
        deadline = time.monotonic() + 60
        while not plugin_records(log) and time.monotonic() < deadline:
            time.sleep(0.01)
    (record,) = (record for record in plugin_records(log) if record["event"] == "request")
    assert (record["status"], record["client_disconnected"]) == (499, True)


def test_exception_within_a_response_is_no_disconnect_of_the_client(log: io.StringIO) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1", "more_body": True})
        raise RuntimeError("broken")

    async def receive() -> Message:
        raise AssertionError

    async def discard(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    asyncio.run(RequestLog(app, ready_service(), [PATH])(scope, receive, discard))
    _, record = plugin_records(log)
    assert (record["status"], record["error"]) == (200, "internal_error")
    assert "client_disconnected" not in record


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"{}", 200, None),
        ("application/json; charset=utf-8", b"{}", 200, None),
        ("Application/JSON", b"{}", 200, None),
        ("application/x-www-form-urlencoded", b"{}", 415, "unsupported_media_type"),
        ("text/plain", b"{}", 415, "unsupported_media_type"),
        (None, b"{}", 415, "unsupported_media_type"),
        ("application/json", b"{", 400, "invalid_json"),
        ("application/json", b"\xff", 400, "invalid_json"),
        ("application/json", b"[" * 100_000, 400, "invalid_json"),
        ("application/json", b"", 400, "missing_required_parameter"),
        ("application/json", b"[]", 400, "invalid_type"),
    ],
)
def test_content_type_and_json(
    content_type: Optional[str], body: bytes, status: int, code: Optional[str]
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = send(ready_service(), "POST", PATH, content=body, headers=headers)
    assert response.status_code == status
    if status != 200:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert error["code"] == code


def test_compressed_bodies_are_refused() -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert send(ready_service(), "POST", PATH, content=b"{}", headers=headers).status_code == 415


def test_health() -> None:
    service = fake_service()
    live, ready = send(service, "GET", "/health/live"), send(service, "GET", "/health/ready")
    assert (live.status_code, ready.status_code) == (200, 503)
    assert (ready.json()["status"], ready.headers["Retry-After"]) == ("loading", "1")
    service.engine.ready = True
    service.metrics = Metrics()  # each app of a service needs its own
    assert send(service, "GET", "/health/ready").json() == {"status": "ready", "model": "counting"}
    service.draining = True
    service.metrics = Metrics()
    response = send(service, "GET", "/health/ready")
    assert (response.status_code, response.json()["status"]) == (503, "draining")
    assert response.headers["Connection"] == "close"


def test_metrics() -> None:
    service = ready_service(max_running=1, max_waiting=0)
    app = fake_app(service)

    async def send_requests() -> str:
        """Send requests and return the metrics while one slot is in use."""
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST) as client:
            await client.post(PATH, json={})
            async with service.admission.slots(1, None):
                await client.post(PATH, json={})
                await client.get("/any/path")
                await client.get("/second/path")
                service.metrics.first_token(0.3)
                service.metrics.next_tokens(4, 0.2)
                return (await client.get("/metrics")).text

    # (name, (label, value), …) -> value of the sample
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(asyncio.run(send_requests()))
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return values[(f"qwenvl_{name}", *sorted(labels.items()))]

    assert value("requests_total", path=PATH, status="200") == 1
    assert value("requests_total", path=PATH, status="429") == 1
    assert value("requests_total", path="other", status="404") == 2
    assert value("request_duration_seconds_count", path=PATH) == 2
    assert value("errors_total", kind="rate_limit_exceeded") == 1
    assert value("errors_total", kind="not_found") == 2
    # The first request and the slot of this test; the second request was refused.
    assert value("queue_duration_seconds_count") == 2
    assert value("time_to_first_token_seconds_sum") == pytest.approx(0.3)
    # Four tokens in 0.2 s are one observation: the mean time of a token.
    assert value("time_between_tokens_seconds_count") == 1
    assert value("time_between_tokens_seconds_sum") == pytest.approx(0.05)
    assert (value("slots_running"), value("queue_waiting")) == (1, 0)
    assert (value("engine_ready"), value("engine_restarts_total")) == (1, 0)
    # The statistics of CountingEngine.
    assert (value("kv_blocks"), value("kv_blocks_used")) == (100, 7)
    assert value("prompt_tokens_total") == 50
    assert value("cached_prompt_tokens_total") == 20
    assert value("completion_tokens_total") == 30
    assert ("process_resident_memory_bytes",) in values


def connect(url: str) -> socket.socket:
    """Open a TCP connection to a server."""
    parts = httpx.URL(url)
    return socket.create_connection((parts.host, parts.port), timeout=60)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the peer closes the connection."""
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)
