"""A server for the page: its files under the content policy, and answers that a test has written down."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional, Union

import paddlemix_qwenvl_plugin
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

PAGE = Path(paddlemix_qwenvl_plugin.__file__).parent / "serve" / "page"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PATIENCE = 60.0  # seconds


class Gate:
    """A place in an answer where the server waits: for the test, or for the page to go away."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.left = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def wait(self, connection: socket.socket) -> bool:
        """Whether the page is still there once the gate opens."""
        self.reached.set()
        while not self._opened.wait(0.02):
            readable, _, _ = select.select([connection], [], [], 0)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                self.left.set()
                return False
        return True


@dataclass
class Refusal:
    """An answer that is an error with a status."""

    status: int
    message: str = "no"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class StreamError:
    """An error within a stream."""

    message: str


class Broken:
    """The stream ends here without an end."""


Step = Union[str, Gate, StreamError, Broken]
Play = Union[Refusal, Iterable[Step]]


class PageServer(ThreadingHTTPServer):
    """Server of the page with scripted answers.

    Attributes:
        plays: the next answers; a list of steps, or a Refusal.
        bodies: the requests for answers, in order.
        key: the required API key, if any.
        ready: response of /health/ready.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plays: deque[Play] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.key: Optional[str] = None
        self.ready = 200
        self.finish = "stop"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def play(self, body: dict[str, Any]) -> Play:
        return self.plays.popleft()

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The page may go away in the middle of anything."""


class Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health/ready":
            self._json(self.server.ready, {})
        elif path == "/v1/models":
            if self._has_key():
                self._json(200, {"object": "list", "data": [{"id": "qwen-vl-chat", "object": "model"}]})
        else:
            file = PAGE / (path[1:] or "index.html")
            if file.parent != PAGE or not file.is_file():
                self._refuse(Refusal(404))
                return
            headers = {
                "Content-Type": f"{TYPES[file.suffix]}; charset=utf-8",
                "Content-Security-Policy": POLICY,
            }
            self._send(200, headers, file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        assert self.path == "/v1/chat/completions"
        self.server.bodies.append(body)
        play = self.server.play(body)
        if isinstance(play, Refusal):
            self._refuse(play)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in self._events(play):
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True

    def _events(self, steps: Iterable[Step]) -> Iterator[str]:
        text, n_deltas, boxes = "", 0, 0
        yield _chunk({"role": "assistant", "content": ""})
        for step in steps:
            if isinstance(step, Broken):
                return
            if isinstance(step, StreamError):
                yield json.dumps({"error": {"message": step.message, "type": "server_error", "code": None}})
                return
            if isinstance(step, Gate):
                if not step.wait(self.connection):
                    return
                continue
            text, n_deltas = text + step, n_deltas + 1
            found = [
                {"kind": box.kind, "ref": box.ref, "points": box.points, "pixels": None}
                for box in parse_boxes(text).boxes
            ]
            yield _chunk({"content": step, **({"boxes": found[boxes:]} if found[boxes:] else {})})
            boxes = len(found)
        yield _chunk({}, self.server.finish)
        yield json.dumps({"choices": [], "usage": {"completion_tokens": n_deltas, "prompt_tokens": 9}})
        yield "[DONE]"

    def _has_key(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._refuse(Refusal(401, "Incorrect API key"))
        return False

    def _refuse(self, refusal: Refusal) -> None:
        error = {"message": refusal.message, "type": "error", "param": None, "code": None}
        self._json(refusal.status, {"error": error}, refusal.headers)

    def _json(self, status: int, value: Any, headers: Mapping[str, str] = {}) -> None:
        self._send(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _chunk(delta: Mapping[str, Any], finish: Optional[str] = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
