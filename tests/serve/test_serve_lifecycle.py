"""Lifecycle of a server process: start, signals, replacement by a new server, slow clients."""

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
from serve_process import ServerProcess, wait_until
from serve_service_helpers import PATH, CountingEngine, fake_service, served

from paddlemix_qwenvl_plugin.serve import connection
from paddlemix_qwenvl_plugin.serve import start as start_module
from paddlemix_qwenvl_plugin.serve.listening import Listener, accept_queued, bound_socket
from paddlemix_qwenvl_plugin.serve.reuse_port import direct_to_newer_server, distribute_to_all_servers
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings
from paddlemix_qwenvl_plugin.serve.start import start as run_start
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

TIMEOUT = 120.0  # seconds; longer than any operation takes on a busy machine


class Process(ServerProcess):
    """`qwenvl serve` with a CountingEngine.

    `engine` is the ENGINE_JSON of serve_fake_server.py: the arguments of the CountingEngine, and optionally the error
    of its start. `prefix` is put before the server's command, and runs it.
    """

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
    """Function that starts a Process, which is killed after the test."""
    processes: list[Process] = []

    def start(*flags: object, **arguments: Any) -> Process:
        processes.append(Process(*flags, **arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.close()


class StreamClient(threading.Thread):
    """Client that reads a stream in a thread; the constructor returns when the first event has arrived.

    Attributes:
        events: the data of all events so far, and "cut off" if the connection was closed within the stream.
    """

    def __init__(self, url: str, n_tokens: int) -> None:
        super().__init__(daemon=True)
        self._started_streaming = threading.Event()
        self.events: list[Any] = []
        self._url, self._n_tokens = url, n_tokens
        self.start()
        assert self._started_streaming.wait(TIMEOUT)

    def run(self) -> None:
        body = {"stream": True, "n_tokens": self._n_tokens}
        try:
            with httpx.stream("POST", self._url + PATH, json=body, timeout=TIMEOUT) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self._started_streaming.set()
                        self.events.append(line[len("data: ") :])
        except httpx.TransportError:
            self.events.append("cut off")

    def all_events(self) -> list[str]:
        """Wait for the end of the stream and return all events."""
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.events


def is_refused(url: str) -> bool:
    """Whether the server refuses connections."""
    try:
        httpx.get(f"{url}/health/live", timeout=TIMEOUT)
    except httpx.TransportError:
        return True
    return False


def test_sigterm_finishes_running_requests(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"pause": 0.02})
    url = process.wait_until_ready()
    # The connection of idle_client is open when the signal arrives.
    with httpx.Client(base_url=url, timeout=TIMEOUT) as idle_client:
        assert idle_client.get("/health/ready").status_code == 200
        stream = StreamClient(url, 100)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(url))
        events = stream.all_events()
    assert events == [*(f"[{i}]" for i in range(100)), "[DONE]"]
    code, errors = process.wait_for_exit()
    assert code == 0, errors
    log_events = [json.loads(line)["event"] for line in errors.splitlines()]
    assert log_events == ["ending", "request"]


def test_new_request_on_an_open_connection_gets_503_after_sigterm(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"pause": 0.02})
    url = process.wait_until_ready()
    parts = httpx.URL(url)
    with socket.create_connection((parts.host, parts.port), timeout=TIMEOUT) as connection:
        stream = StreamClient(url, 100)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(url))
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        connection.sendall(f"{head}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in response.lower()
    assert b'"shutting_down"' in response
    assert stream.all_events()[-1] == "[DONE]"
    assert process.wait_for_exit()[0] == 0


def test_shutdown_timeout_ends_streams_with_an_error_event(start: Callable[..., Process]) -> None:
    process = start("--port", 0, "--shutdown_timeout", 0.5, engine={"pause": 0.05})
    stream = StreamClient(process.wait_until_ready(), 100_000)
    process.send_signal(signal.SIGTERM)
    events = stream.all_events()
    assert json.loads(events[-1]) == {"error": "the engine was stopped"}
    code, errors = process.wait_for_exit()
    assert code == 0, errors


def test_waiting_request_is_served_during_the_shutdown(start: Callable[..., Process]) -> None:
    process = start("--port", 0, "--max_running", 1, engine={"pause": 0.02})
    url = process.wait_until_ready()
    first = StreamClient(url, 50)
    responses: list[httpx.Response] = []
    body = {"n_tokens": 3}
    second = threading.Thread(
        target=lambda: responses.append(httpx.post(url + PATH, json=body, timeout=TIMEOUT)), daemon=True
    )
    second.start()
    wait_until(lambda: "qwenvl_queue_waiting 1.0" in httpx.get(f"{url}/metrics", timeout=TIMEOUT).text)
    process.send_signal(signal.SIGINT)
    second.join(TIMEOUT)
    assert "[2]" in responses[0].json()["answer"]  # the last of its three tokens
    assert first.all_events()[-1] == "[DONE]"
    assert process.wait_for_exit()[0] == 0


@pytest.mark.parametrize(
    ("signal_number", "code", "message"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_second_signal_ends_the_server_immediately(
    signal_number: int, code: int, message: str, start: Callable[..., Process]
) -> None:
    process = start("--port", 0, "--shutdown_timeout", 1000, engine={"pause": 0.02})
    url = process.wait_until_ready()
    stream = StreamClient(url, 1_000_000)
    process.send_signal(signal_number)
    wait_until(lambda: is_refused(url))
    process.send_signal(signal_number)
    exit_code, errors = process.wait_for_exit()
    assert exit_code == code
    assert errors.splitlines()[-1] == f"qwenvl: {message}"
    assert stream.all_events()[-1] != "[DONE]"


def test_server_answers_while_the_engine_starts(start: Callable[..., Process], unused_port: int) -> None:
    process = start("--port", unused_port, engine={"loading": 10_000})
    url = f"http://127.0.0.1:{unused_port}"
    wait_until(lambda: not is_refused(url))
    assert httpx.get(f"{url}/health/live").status_code == 200
    health = httpx.get(f"{url}/health/ready")
    assert (health.status_code, health.headers["Retry-After"]) == (503, "1")
    assert "not ready" in httpx.post(url + PATH, json={}, timeout=TIMEOUT).text
    process.send_signal(signal.SIGTERM)
    code, errors = process.wait_for_exit()
    assert code == 0, errors


def test_engine_that_does_not_start(start: Callable[..., Process]) -> None:
    process = start("--port", 0, engine={"start_error": "text/qwen.pdiparams: missing; export again"})
    code, errors = process.wait_for_exit()
    assert (code, errors) == (1, "qwenvl: text/qwen.pdiparams: missing; export again\n")


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = f"^--port {port}: another program listens on this port; choose another port, or 0 for any free port$"
        for reuse_port in (False, True):
            with pytest.raises(QwenVLError, match=line):
                run_start(ServeSettings(demo=True, port=port, reuse_port=reuse_port), (), print)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0: other machines could use the server without a key;"),
        ({"host": "no-such-host.invalid"}, "--host no-such-host.invalid: no such address"),
        ({"host": "192.0.2.1", "no_auth": True}, "--host 192.0.2.1: not an address of this machine"),
    ],
)
def test_invalid_host(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(QwenVLError, match=f"^{re.escape(message)}"):
        run_start(ServeSettings(demo=True, port=0, **settings), (), print)


def test_exposed_socket_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the socket, not the flag --host, which does not apply."""
    listener = Listener(socket.create_server(("0.0.0.0", 0)), inherited=True)
    monkeypatch.setattr(start_module, "bound_socket", lambda *args: listener)
    with pytest.raises(UsageError, match=r"^systemd's socket at 0\.0\.0\.0: other machines could use"):
        run_start(ServeSettings(demo=True), (), print)


def with_systemd_socket(listener: socket.socket) -> dict[str, Any]:
    """Arguments of `start` that pass a socket as systemd does: as descriptor 3, with LISTEN_PID and LISTEN_FDS."""
    return {
        "pass_fds": [3],
        "preexec_fn": lambda: os.dup2(listener.fileno(), 3),
        "prefix": ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', "sh"],
    }


def test_socket_of_systemd(start: Callable[..., Process]) -> None:
    """Two servers, one after the other, use the same socket; its port counts, not that of the flag --port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(2):
            process = start("--port", 1, **with_systemd_socket(listener))
            assert process.wait_until_ready() == url
            assert httpx.get(f"{url}/health/ready", timeout=TIMEOUT).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait_for_exit()[0] == 0


def test_systemd_socket_that_is_not_of_tcp(start: Callable[..., Process], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        code, log = start(**with_systemd_socket(listener)).wait_for_exit()
    assert code == 2
    assert log.endswith("systemd passed no TCP socket; give the unit ListenStream=PORT or HOST:PORT\n")


class Load:
    """Four clients with sequential requests: two open a connection for each request, two keep their connection.

    Attributes:
        results: result of each request so far: the status, followed by " and an error" if the body has one, or the
            exception.
    """

    def __init__(self, url: str) -> None:
        self.results: list[str] = []
        self._url = url
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_requests, args=[keep_alive], daemon=True)
            for keep_alive in (False, False, True, True)
        ]
        for thread in self._threads:
            thread.start()

    def _send_requests(self, keep_alive: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=int(keep_alive))
        with httpx.Client(base_url=self._url, timeout=TIMEOUT, limits=limits) as client:
            while not self._stopped.is_set():
                try:
                    response = client.post(PATH, json={"n_tokens": 2})
                    suffix = " and an error" if "error" in response.text else ""
                    self.results.append(f"{response.status_code}{suffix}")
                except httpx.TransportError as error:
                    self.results.append(repr(error))

    def wait_for_requests(self, n: int) -> None:
        """Wait for the results of n further requests."""
        target = len(self.results) + n
        wait_until(lambda: len(self.results) >= target)

    def stop(self) -> list[str]:
        """Stop the clients and return all results."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(TIMEOUT)
        return self.results


def test_replacement_with_reuse_port_loses_no_request(
    start: Callable[..., Process], unused_port: int
) -> None:
    flags = ["--port", unused_port, "--reuse_port"]
    old = start(*flags, engine={"pause": 0.005})
    load = Load(old.wait_until_ready())
    load.wait_for_requests(50)
    start(*flags, engine={"pause": 0.005}).wait_until_ready()
    load.wait_for_requests(50)
    old.send_signal(signal.SIGTERM)
    load.wait_for_requests(50)
    code, errors = old.wait_for_exit()
    assert code == 0, errors
    load.wait_for_requests(50)
    assert {*load.stop()} == {"200"}


def test_restart_with_a_socket_of_systemd_loses_no_request(start: Callable[..., Process]) -> None:
    """Connections wait in the socket's queue until the second server is ready."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        first = start(engine={"pause": 0.005}, **with_systemd_socket(listener))
        load = Load(first.wait_until_ready())
        load.wait_for_requests(50)
        first.send_signal(signal.SIGTERM)
        code, errors = first.wait_for_exit()
        assert code == 0, errors
        start(engine={"loading": 0.5}, **with_systemd_socket(listener))
        load.wait_for_requests(50)
        assert {*load.stop()} == {"200"}


def test_second_server_does_not_listen_before_it_is_ready(
    start: Callable[..., Process], unused_port: int
) -> None:
    flags = ["--port", unused_port, "--reuse_port"]
    url = start(*flags).wait_until_ready()
    loading = start(*flags, engine={"loading": 10_000, "print_loading": True})
    assert loading.read_line() == "loading\n"
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, limits=limits, timeout=TIMEOUT) as client:
        assert {client.get("/health/ready").status_code for _ in range(100)} == {200}
    loading.send_signal(signal.SIGTERM)
    assert loading.wait_for_exit()[0] == 0


def test_send_timeout_ends_the_request_of_a_client_that_does_not_read() -> None:
    engine = CountingEngine()
    service = fake_service(engine, send_timeout=0.5)
    with served(service) as url:
        parts = httpx.URL(url)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((parts.host, parts.port))
            body = json.dumps({"stream": True, "n_tokens": 10**9, "padding": 10**5})
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
            connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: engine.streams)
            wait_until(lambda: service.admission.running == 0)
        # A client that reads is not affected, however long the response is.
        json_body = {"stream": True, "n_tokens": 300, "padding": 10**5}
        with httpx.stream("POST", url + PATH, json=json_body, timeout=TIMEOUT) as response:
            assert sum(len(chunk) for chunk in response.iter_bytes()) > 300 * 10**5


def test_connection_without_a_complete_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    engine = CountingEngine()
    with served(fake_service(engine)) as url:
        parts = httpx.URL(url)
        for begin in (b"", b"GET /health/live HTTP/1.1\r\nHost: loc"):
            with socket.create_connection((parts.host, parts.port), timeout=TIMEOUT) as slow:
                slow.sendall(begin)
                with contextlib.suppress(ConnectionResetError):
                    assert slow.recv(65536) == b""
        with socket.create_connection((parts.host, parts.port), timeout=TIMEOUT) as slow:
            slow.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
            slow.sendall(b"GET /health/live HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionResetError):
                while slow.recv(65536):
                    pass
        # The timeout does not apply while a response is sent.
        engine.pause = 0.1
        with httpx.stream(
            "POST", url + PATH, json={"stream": True, "n_tokens": 20}, timeout=TIMEOUT
        ) as response:
            assert response.read().endswith(b"[DONE]\n\n")


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can select a socket among several on a port")
def test_new_connections_go_to_the_newest_server(unused_port: int) -> None:
    def counts_of_connections(n: int) -> list[int]:
        """Open n connections and return how many of them each listener gets."""
        address = ("127.0.0.1", unused_port)
        clients = [socket.create_connection(address, timeout=TIMEOUT) for _ in range(n)]
        counts = [len(accept_queued(listener)) for listener in listeners]
        for client in clients:
            client.close()
        return counts

    with contextlib.ExitStack() as stack:
        old, new, newest = (
            stack.enter_context(bound_socket("127.0.0.1", unused_port, reuse_port=True).socket)
            for _ in range(3)
        )
        listeners = [old]
        old.listen()
        direct_to_newer_server(old)
        assert counts_of_connections(20) == [20]  # the other sockets do not listen yet
        listeners.append(new)
        new.listen()
        assert counts_of_connections(20) == [0, 20]
        listeners.remove(old)
        old.close()
        assert counts_of_connections(20) == [20]
        # After distribute_to_all_servers, both servers get connections.
        listeners.append(newest)
        newest.listen()
        distribute_to_all_servers(newest)
        assert all(counts_of_connections(100))
