"""Middleware and operations: ids, logs, bodies, headers, errors, health, metrics."""

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

from paddlemix_qwenvl_plugin.serve import json_log
from paddlemix_qwenvl_plugin.serve.middleware.body import BodyLimit
from paddlemix_qwenvl_plugin.serve.service import Service

HOST = "http://127.0.0.1:8000"
MIB = 2**20


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Log records of the server."""
    lines = io.StringIO()
    root = logging.getLogger()
    loggers = [root, json_log.LOGGER, logging.getLogger("uvicorn"), logging.getLogger("asyncio")]
    before = root.handlers[:], [logger.level for logger in loggers]
    monkeypatch.setattr("sys.stderr", lines)
    json_log.start_logging("debug")
    try:
        yield lines
    finally:
        root.handlers[:], levels = before
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        logging.captureWarnings(False)


def events(logged: io.StringIO) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    return [line for line in lines if line["logger"].startswith("paddlemix_qwenvl_plugin")]


def ready_service(**settings: Any) -> Service:
    engine = CountingEngine()
    engine.ready = True
    return fake_service(engine, **settings)


def ask(
    service: Service, method: str, path: str, page: Optional[Path] = None, **request: Any
) -> httpx.Response:
    app = fake_app(service, **({"page": page} if page else {}))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST) as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def test_a_request_has_an_id_and_a_line(logged: io.StringIO, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("some-key")
    keys.chmod(0o600)
    service = ready_service(api_key_file=keys)
    headers = {"Authorization": "Bearer some-key"}
    answer = ask(service, "POST", f"{PATH}?secret=1", json={"n_tokens": 5, "hush": "secret"}, headers=headers)
    assert answer.status_code == 200
    (line,) = events(logged)
    assert line.pop("time")
    seconds, key = line.pop("seconds"), line.pop("key")
    assert 0 <= seconds < 60
    assert line == {
        "level": "info",
        "logger": "paddlemix_qwenvl_plugin.serve",
        "event": "request",
        "id": answer.headers["X-Request-Id"],
        "method": "POST",
        "path": PATH,
        "status": 200,
        "prompt_tokens": 1,
        "completion_tokens": 5,
    }
    assert len(key) == 12
    assert "secret" not in logged.getvalue()
    assert "some-key" not in logged.getvalue()


@pytest.mark.parametrize(
    ("given", "taken"),
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
def test_sane_ids_are_taken(given: str, taken: bool) -> None:
    header = {"X-Request-Id": given.encode("latin-1")}
    answers = [ask(ready_service(), "GET", "/health/live", headers=header) for _ in range(2)]
    ids = [answer.headers["X-Request-Id"] for answer in answers]
    if taken:
        assert ids == [given, given]
    else:
        assert given not in ids
        assert len({*ids}) == 2
        assert all(len(id_) == 32 for id_ in ids)


def test_an_exception_is_an_answer_and_a_traceback_in_the_log(logged: io.StringIO) -> None:
    service = ready_service()
    answer = ask(service, "POST", PATH, json={"raise": "break"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "break" not in answer.text
    exception, request = events(logged)
    assert "RuntimeError: told to: break" in exception["traceback"]
    assert exception["id"] == request["id"] == answer.headers["X-Request-Id"]
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
    answer = ask(ready_service(), method, path, json={})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


def test_every_answer_has_the_security_headers(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    for path in ("/", "/app.js", "/health/live", "/nothing", "/metrics"):
        headers = ask(ready_service(), "GET", path, page=tmp_path).headers
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


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimetypes, "_db", mimetypes.MimeTypes())
    mimetypes.add_type("text/plain", ".js")  # as some systems have it
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "app.js").write_text("1")
    types = {"/": "text/html; charset=utf-8", "/app.js": "text/javascript; charset=utf-8"}
    for path, content_type in types.items():
        headers = ask(ready_service(), "GET", path, page=tmp_path).headers
        # A page and modules of two versions do not go together: a browser asks whether it has the newest.
        assert (headers["Content-Type"], headers["Cache-Control"]) == (content_type, "no-cache")
    assert "Cache-Control" not in ask(ready_service(), "GET", "/health/live", page=tmp_path).headers
    answer = ask(ready_service(), "GET", "/", page=tmp_path)
    assert (answer.status_code, answer.text) == (200, "<p>page</p>")
    again = ask(ready_service(), "GET", "/", page=tmp_path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.headers["Cache-Control"]) == (304, "no-cache")
    assert ask(ready_service(page=False), "GET", "/", page=tmp_path).status_code == 404
    assert ask(ready_service(), "GET", "/", page=tmp_path / "none").status_code == 404


async def _chunks(sizes: list[int]) -> AsyncIterator[bytes]:
    yield b'{"a": "'
    for size in sizes:
        yield b"x" * size
    yield b'"}'


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(MIB - 100, 200), (MIB + 1, 413), (3 * MIB, 413)])
def test_long_bodies(size: int, status: int, chunked: bool) -> None:
    """On real connections: 413 must reach a client that is still sending."""
    with served(ready_service(max_body_bytes=MIB)) as url:
        body: Any = _chunks([size // 4] * 4) if chunked else b'{"a": "' + b"x" * size + b'"}'

        async def go() -> httpx.Response:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                headers = {"Content-Type": "application/json"}
                return await client.post(PATH, content=body, headers=headers)

        if size > 2 * MIB:  # more than is read: the client sees the answer, or a reset
            with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
                assert asyncio.run(go()).status_code == 413
            return
        answer = asyncio.run(go())
        assert answer.status_code == status
        if status == 413:
            error = answer.json()["error"]
            assert error["code"] == "request_too_large"
            assert "1048576 bytes" in error["message"]
            assert answer.headers["Connection"] == "close"


def test_bodies_of_all_requests_are_bounded() -> None:
    """A body counts until its request is answered, also with an error, or the client disconnects."""
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        assert len((await receive())["body"]) == 600_000
        begun.set()
        await release.wait()
        await Response("done")(scope, receive, send)

    async def go() -> None:
        limited = BodyLimit(slow, max_bytes=MIB, max_held_bytes=MIB, timeout=60)
        transport = httpx.ASGITransport(app=limited)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def post() -> httpx.Response:
                headers = {"Content-Type": "application/json"}
                return await client.post("/", content=b"x" * 600_000, headers=headers)

            first = asyncio.create_task(post())
            await begun.wait()
            second = await asyncio.wait_for(post(), 10)
            assert second.status_code == 429
            assert second.headers["Retry-After"] == "1"
            assert second.json()["error"]["type"] == "rate_limit_error"
            assert limited._held_bytes == 600_000
            release.set()
            assert (await first).text == "done"
            assert limited._held_bytes == 0
            assert (await post()).text == "done"

    asyncio.run(go())


def test_who_asks_before_sending_is_told_before_sending() -> None:
    """Curl asks "Expect: 100-continue" for long bodies."""
    with served(ready_service(max_body_bytes=MIB)) as url, connected(url) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Type: application/json"
        connection.sendall(f"{head}\r\nContent-Length: {2 * MIB}\r\n\r\n".encode())
        assert received(connection).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come() -> None:
    with served(ready_service(body_timeout=0.3)) as url, connected(url) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        connection.sendall(f'{head}\r\nContent-Length: 100\r\n\r\n{{"a":'.encode())
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in answer


def test_a_client_that_leaves_within_a_burst_of_events(logged: io.StringIO) -> None:
    """Asyncio warns of the fifth write after the one that failed."""

    async def write() -> None:
        ours, theirs = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=ours)
        theirs.close()
        for _ in range(10):
            writer.write(b"data: 1\n\n")
        writer.close()

    asyncio.run(write())
    assert logged.getvalue() == ""


def test_a_client_that_leaves_within_its_body(logged: io.StringIO) -> None:
    service = ready_service()
    with served(service) as url:
        with connected(url) as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            connection.sendall(f'{head}\r\nContent-Length: 100\r\n\r\n{{"a":'.encode())
        deadline = time.monotonic() + 60
        while not events(logged) and time.monotonic() < deadline:
            time.sleep(0.01)
    (line,) = (line for line in events(logged) if line["event"] == "request")
    assert (line["status"], line["client_left"]) == (499, True)


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
        ("application/json", b"[" * 100_000, 400, None),
        ("application/json", b"", 400, None),
        ("application/json", b"[]", 400, None),
    ],
)
def test_content_types(content_type: Optional[str], body: bytes, status: int, code: Optional[str]) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = ask(ready_service(), "POST", PATH, content=body, headers=headers)
    assert answer.status_code == status
    if status != 200:
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert code is None or error["code"] == code


def test_compressed_bodies_are_refused() -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert ask(ready_service(), "POST", PATH, content=b"{}", headers=headers).status_code == 415


def test_health() -> None:
    service = fake_service()
    live, ready = (ask(service, "GET", f"/health/{name}") for name in ("live", "ready"))
    assert (live.status_code, ready.status_code) == (200, 503)
    assert (ready.json()["status"], ready.headers["Retry-After"]) == ("loading", "1")
    service.engine.ready = True
    service.metrics = type(service.metrics)()
    assert ask(service, "GET", "/health/ready").json() == {"status": "ready", "model": "counting"}
    service.draining = True
    service.metrics = type(service.metrics)()
    answer = ask(service, "GET", "/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "draining")
    assert answer.headers["Connection"] == "close"


def test_metrics() -> None:
    service = ready_service(max_running=1, max_waiting=0)
    app = fake_app(service)

    async def go() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HOST) as client:
            await client.post(PATH, json={})
            async with service.admission.slots(1, None):
                await client.post(PATH, json={})
                await client.get("/any/path")
                await client.get("/other/path")
                service.metrics.first_token(0.3)
                service.metrics.next_tokens(4, 0.2)
                return (await client.get("/metrics")).text

    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(asyncio.run(go()))
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
    assert value("queue_duration_seconds_count") == 2
    assert value("time_to_first_token_seconds_sum") == pytest.approx(0.3)
    assert value("time_between_tokens_seconds_count") == 1
    assert value("time_between_tokens_seconds_sum") == pytest.approx(0.05)
    assert (value("slots_running"), value("queue_waiting")) == (1, 0)
    assert (value("engine_ready"), value("engine_restarts_total")) == (1, 0)
    assert (value("kv_blocks"), value("kv_blocks_used")) == (100, 7)
    assert value("prompt_tokens_total") == 50
    assert value("cached_prompt_tokens_total") == 20
    assert value("completion_tokens_total") == 30
    assert ("process_resident_memory_bytes",) in values


def connected(url: str) -> socket.socket:
    """A raw connection to a server."""
    parts = httpx.URL(url)
    return socket.create_connection((parts.host, parts.port), timeout=60)


def received(connection: socket.socket) -> bytes:
    """Read until the peer closes."""
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)
