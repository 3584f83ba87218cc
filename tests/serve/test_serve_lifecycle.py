"""Lifecycle of a server process: signals, handover, slow clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import httpx
import pytest
from serve_process import ServerProcess
from serve_process import wait_until as until
from serve_service_helpers import PATH, CountingEngine, fake_service, served

from paddlemix_qwenvl_plugin.serve import connection
from paddlemix_qwenvl_plugin.serve.listening import accept_queued, bound_socket
from paddlemix_qwenvl_plugin.serve.reuse_port import give_to_all, give_to_the_newer
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.start import start as run_start
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

LONG = 120.0


class Process(ServerProcess):
    """`qwenvl serve` around a counting engine."""

    def __init__(
        self,
        *flags: object,
        engine: Optional[dict[str, Any]] = None,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> None:
        script = Path(__file__).with_name("serve_fake_server.py")
        command = [*prefix, sys.executable, str(script), json.dumps(engine or {})]
        super().__init__(flags, command, **options)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(*flags: object, **arguments: Any) -> Process:
        processes.append(Process(*flags, **arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


class Streaming(threading.Thread):
    """A client that reads a stream in a thread."""

    def __init__(self, url: str, n_tokens: int) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.events: list[Any] = []
        self._url, self._n_tokens = url, n_tokens
        self.start()
        assert self.begun.wait(LONG)

    def run(self) -> None:
        body = {"stream": True, "n_tokens": self._n_tokens}
        try:
            with httpx.stream("POST", self._url + PATH, json=body, timeout=LONG) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.begun.set()
                        self.events.append(line[len("data: ") :])
        except httpx.TransportError:
            self.events.append("cut off")

    def all(self) -> list[str]:
        self.join(LONG)
        assert not self.is_alive()
        return self.events


def refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health/live", timeout=LONG)
    except httpx.TransportError:
        return True
    return False


def test_running_requests_are_finished(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"pause": 0.02})
    url = process.wait_until_ready()
    with httpx.Client(base_url=url, timeout=LONG) as idle:
        assert idle.get("/health/ready").status_code == 200
        stream = Streaming(url, 100)
        process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        events = stream.all()
    assert events == [*(f"[{i}]" for i in range(100)), "[DONE]"]
    code, errors = process.wait_for_exit()
    assert code == 0, errors
    said = [json.loads(line)["event"] for line in errors.splitlines()]
    assert said == ["ending", "request"]


def test_who_is_connected_already_gets_503(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"pause": 0.02})
    url = process.wait_until_ready()
    parts = httpx.URL(url)
    with socket.create_connection((parts.host, parts.port), timeout=LONG) as waiting:
        stream = Streaming(url, 100)
        process.send_signal(signal.SIGTERM)
        until(lambda: refused(url))
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        waiting.sendall(f"{head}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        answer = b"".join(iter(lambda: waiting.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in answer.lower()
    assert b'"shutting_down"' in answer
    assert stream.all()[-1] == "[DONE]"
    assert process.wait_for_exit()[0] == 0


def test_too_long_requests_end_with_an_error_event(start: Callable[..., Process]) -> None:
    process = start("--port", 0, "--shutdown_timeout", 0.5, engine={"pause": 0.05})
    stream = Streaming(process.wait_until_ready(), 100_000)
    process.send_signal(signal.SIGTERM)
    events = stream.all()
    assert json.loads(events[-1]) == {"error": "the engine was stopped"}
    code, errors = process.wait_for_exit()
    assert code == 0, errors


def test_who_waits_for_a_slot_is_served_before_the_end(start: Callable[..., Process]) -> None:
    process = start("--port", 0, "--max_running", 1, engine={"pause": 0.02})
    url = process.wait_until_ready()
    first = Streaming(url, 50)
    answers: list[httpx.Response] = []
    body = {"n_tokens": 3}
    second = threading.Thread(
        target=lambda: answers.append(httpx.post(url + PATH, json=body, timeout=LONG)), daemon=True
    )
    second.start()
    until(lambda: "qwenvl_queue_waiting 1.0" in httpx.get(f"{url}/metrics", timeout=LONG).text)
    process.send_signal(signal.SIGINT)
    second.join(LONG)
    assert "[2]" in answers[0].json()["answer"]
    assert first.all()[-1] == "[DONE]"
    assert process.wait_for_exit()[0] == 0


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_second_signal_ends_it_at_once(
    number: int, code: int, word: str, start: Callable[..., Process]
) -> None:
    process = start("--port", 0, "--shutdown_timeout", 1000, engine={"pause": 0.02})
    url = process.wait_until_ready()
    stream = Streaming(url, 1_000_000)
    process.send_signal(number)
    until(lambda: refused(url))
    process.send_signal(number)
    ended, errors = process.wait_for_exit()
    assert ended == code
    assert errors.splitlines()[-1] == f"qwenvl: {word}"
    assert stream.all()[-1] != "[DONE]"


def test_it_lives_before_it_is_ready(start: Callable[..., Process], unused_port: int) -> None:
    process = start("--port", unused_port, engine={"loading": 10_000})
    url = f"http://127.0.0.1:{unused_port}"
    until(lambda: not refused(url))
    assert httpx.get(f"{url}/health/live").status_code == 200
    answer = httpx.get(f"{url}/health/ready")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    answer = httpx.post(url + PATH, json={}, timeout=LONG)
    assert "not ready" in answer.text
    process.send_signal(signal.SIGTERM)
    code, errors = process.wait_for_exit()
    assert code == 0, errors


def test_an_engine_that_does_not_start(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"start_error": "text/qwen.pdiparams: missing; export again"})
    code, errors = process.wait_for_exit()
    assert (code, errors) == (1, "qwenvl: text/qwen.pdiparams: missing; export again\n")


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = f"^--port {port}: another program listens there; name another one, or 0 for any that is free$"
        for reuse_port in (False, True):
            with pytest.raises(QwenVLError, match=line):
                run_start(ServeSettings(demo=True, port=port, reuse_port=reuse_port), (), print)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could use the server without a key;"),
        ({"host": "no-such-host.invalid"}, "--host no-such-host.invalid: no such address"),
        ({"host": "192.0.2.1", "no_auth": True}, "--host 192.0.2.1: not an address of this machine"),
    ],
)
def test_addresses_that_are_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(QwenVLError, match=f"^{re.escape(line)}"):
        run_start(ServeSettings(demo=True, port=0, **settings), (), print)


def test_a_socket_of_systemd(start: Callable[..., Process]) -> None:
    """A socket as systemd passes it: descriptor 3, LISTEN_PID the id of the process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        hand_over = {"pass_fds": [3], "preexec_fn": lambda: os.dup2(listener.fileno(), 3) and None}
        with_number = ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh"]
        for _ in range(2):  # the second finds what has come since the first ended
            process = start("--port", 1, prefix=with_number, **hand_over)
            assert process.wait_until_ready() == url
            assert httpx.get(f"{url}/health/ready", timeout=LONG).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait_for_exit()[0] == 0


class Load:
    """Client with sequential requests, on one connection each or on one for all."""

    def __init__(self, url: str) -> None:
        self.answers: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=[keep], daemon=True)
            for keep in (False, False, True, True)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, keep_alive: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=int(keep_alive))
        with httpx.Client(base_url=self._url, timeout=LONG, limits=limits) as client:
            while not self._over.is_set():
                try:
                    answer = client.post(PATH, json={"n_tokens": 2})
                    failed = " and an error" if "error" in answer.text else ""
                    self.answers.append(f"{answer.status_code}{failed}")
                except httpx.TransportError as error:
                    self.answers.append(repr(error))

    def more(self, n: int) -> None:
        """Wait for n more answers."""
        target = len(self.answers) + n
        until(lambda: len(self.answers) >= target)

    def end(self) -> list[str]:
        self._over.set()
        for thread in self._threads:
            thread.join(LONG)
        return self.answers


def test_an_upgrade_drops_no_request(start: Callable[..., Process], unused_port: int) -> None:
    flags = ["--port", unused_port, "--reuse_port"]
    old = start(*flags, engine={"pause": 0.005})
    load = Load(old.wait_until_ready())
    load.more(50)
    start(*flags, engine={"pause": 0.005}).wait_until_ready()
    load.more(50)
    old.send_signal(signal.SIGTERM)
    load.more(50)
    code, errors = old.wait_for_exit()
    assert code == 0, errors
    load.more(50)
    assert {*load.end()} == {"200"}


def test_a_restart_behind_a_socket_of_systemd_drops_no_request(start: Callable[..., Process]) -> None:
    """Requests wait in the socket while the first server ends and the second one loads."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        hand_over = {"pass_fds": [3], "preexec_fn": lambda: os.dup2(listener.fileno(), 3) and None}
        with_number = ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh"]
        first = start(engine={"pause": 0.005}, prefix=with_number, **hand_over)
        load = Load(first.wait_until_ready())
        load.more(50)
        first.send_signal(signal.SIGTERM)
        code, errors = first.wait_for_exit()
        assert code == 0, errors
        start(engine={"loading": 0.5}, prefix=with_number, **hand_over)
        load.more(50)
        assert {*load.end()} == {"200"}


def test_a_second_server_does_not_listen_before_it_is_ready(
    start: Callable[..., Process], unused_port: int
) -> None:
    flags = ["--port", unused_port, "--reuse_port"]
    url = start(*flags).wait_until_ready()
    loading = start(*flags, engine={"loading": 10_000, "print_loading": True})
    assert loading.read_line() == "loading\n"
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, limits=limits, timeout=LONG) as client:
        assert {client.get("/health/ready").status_code for _ in range(100)} == {200}
    loading.send_signal(signal.SIGTERM)
    assert loading.wait_for_exit()[0] == 0


def test_a_client_that_does_not_read_is_cut_off() -> None:
    engine = CountingEngine()
    service = fake_service(engine, send_timeout=0.5)
    with served(service) as url:
        parts = httpx.URL(url)
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect((parts.host, parts.port))
            body = json.dumps({"stream": True, "n_tokens": 10**9, "padding": 10**5})
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            lazy.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: engine.streams)
            until(lambda: service.admission.running == 0)
        # One that reads, however much, is not.
        json_body = {"stream": True, "n_tokens": 300, "padding": 10**5}
        with httpx.stream("POST", url + PATH, json=json_body, timeout=LONG) as answer:
            assert sum(len(chunk) for chunk in answer.iter_bytes()) > 300 * 10**5


def test_a_client_that_sends_no_request_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    engine = CountingEngine()
    with served(fake_service(engine)) as url:
        parts = httpx.URL(url)
        for begin in (b"", b"GET /health/live HTTP/1.1\r\nHost: loc"):
            with socket.create_connection((parts.host, parts.port), timeout=LONG) as slow:
                slow.sendall(begin)
                with contextlib.suppress(ConnectionResetError):
                    assert slow.recv(65536) == b""
        with socket.create_connection((parts.host, parts.port), timeout=LONG) as slow:
            slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
            slow.sendall(b"GET /health/live HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionResetError):
                while slow.recv(65536):
                    pass
        # A long answer takes its time.
        engine.pause = 0.1
        with httpx.stream("POST", url + PATH, json={"stream": True, "n_tokens": 20}, timeout=LONG) as answer:
            assert answer.read().endswith(b"[DONE]\n\n")


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a server choose among sockets on a port")
def test_the_older_of_two_servers_gets_no_more_connections(unused_port: int) -> None:
    def numbers_of(n: int) -> list[int]:
        """Indices of the listeners that get n new connections."""
        address = ("127.0.0.1", unused_port)
        clients = [socket.create_connection(address, timeout=LONG) for _ in range(n)]
        counts = [len(accept_queued(listener)) for listener in listeners]
        for client in clients:
            client.close()
        return counts

    with contextlib.ExitStack() as stack:
        old, new, newest = (
            stack.enter_context(bound_socket("127.0.0.1", unused_port, True).socket) for _ in range(3)
        )
        listeners = [old]
        old.listen()
        give_to_the_newer(old)
        assert numbers_of(20) == [20]  # the others do not listen yet
        listeners.append(new)
        new.listen()
        assert numbers_of(20) == [0, 20]
        listeners.remove(old)
        old.close()
        assert numbers_of(20) == [20]
        listeners.append(newest)
        newest.listen()
        give_to_all(newest)
        assert all(numbers_of(100))
