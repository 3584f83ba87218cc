"""Mock server for the chat page: serves the page's files with a content security policy, and scripted answers."""

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
# As strict as the policy of serve/middleware/headers.py, whose default-src covers styles, scripts and connections.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CONTENT_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
TIMEOUT = 60.0  # seconds


class Gate:
    """Point of an answer at which the server waits until the test opens the gate or the page disconnects.

    Attributes:
        disconnected: event, set when the page has disconnected at this gate.
    """

    def __init__(self) -> None:
        self.disconnected = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def wait(self, connection: socket.socket) -> bool:
        """Wait; return whether the page is still connected."""
        while not self._opened.wait(0.02):
            readable, _, _ = select.select([connection], [], [], 0)
            if readable and not connection.recv(1, socket.MSG_PEEK):
                self.disconnected.set()
                return False
        return True


@dataclass
class Refusal:
    """Answer that is an error response."""

    status: int
    message: str = "no"
    headers: Mapping[str, str] = field(default_factory=dict)
    code: Optional[str] = None


@dataclass
class StreamError:
    """Error event that ends a stream."""

    message: str


class ConnectionLoss:
    """Step at which the connection is closed in the middle of a stream."""


# A string is the text of one delta.
Step = Union[str, Gate, StreamError, ConnectionLoss]
ScriptedAnswer = Union[Refusal, Iterable[Step]]


class PageServer(ThreadingHTTPServer):
    """Server of the page with scripted answers.

    Attributes:
        answers: the next answers, each a list of steps or a Refusal.
        bodies: the bodies of all chat completion requests with a valid API key, in order.
        key: the required API key, if any.
        ready_status: status of /health/ready.
        finish_reason: finish reason of the next answers.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: deque[ScriptedAnswer] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.key: Optional[str] = None
        self.ready_status = 200
        self.finish_reason = "stop"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: the page may disconnect at any time."""


class Handler(BaseHTTPRequestHandler):
    """Request handler of a PageServer."""

    server: PageServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health/ready":
            self._json(self.server.ready_status, {})
        elif path == "/v1/models":
            if self._has_key():
                self._json(200, {"object": "list", "data": [{"id": "qwen-vl-chat", "object": "model"}]})
        else:
            file = PAGE / (path[1:] or "index.html")
            if file.parent != PAGE or not file.is_file():
                self._refuse(Refusal(404))
                return
            headers = {
                "Content-Type": f"{CONTENT_TYPES[file.suffix]}; charset=utf-8",
                "Content-Security-Policy": POLICY,
            }
            self._send(200, headers, file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        assert self.path == "/v1/chat/completions"
        self.server.bodies.append(body)
        answer = self.server.answers.popleft()
        if isinstance(answer, Refusal):
            self._refuse(answer)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in self._events(answer):
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True

    def _events(self, steps: Iterable[Step]) -> Iterator[str]:
        """The data of the events of a streamed answer; each delta has the boxes that it completes."""
        text, n_deltas, n_boxes_sent = "", 0, 0
        yield _chunk({"role": "assistant", "content": ""})
        for step in steps:
            if isinstance(step, ConnectionLoss):
                return
            if isinstance(step, StreamError):
                yield json.dumps({"error": {"message": step.message, "type": "server_error", "code": None}})
                return
            if isinstance(step, Gate):
                if not step.wait(self.connection):
                    return
                continue
            text, n_deltas = text + step, n_deltas + 1
            boxes = [
                {"kind": box.kind, "ref": box.ref, "points": box.points, "pixels": None}
                for box in parse_boxes(text).boxes
            ]
            delta: dict[str, Any] = {"content": step}
            if len(boxes) > n_boxes_sent:
                delta["boxes"] = boxes[n_boxes_sent:]
            yield _chunk(delta)
            n_boxes_sent = len(boxes)
        yield _chunk({}, self.server.finish_reason)
        yield json.dumps({"choices": [], "usage": {"completion_tokens": n_deltas, "prompt_tokens": 9}})
        yield "[DONE]"

    def _has_key(self) -> bool:
        """Check the API key of the request; send a response if it is wrong."""
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._refuse(Refusal(401, "Incorrect API key"))
        return False

    def _refuse(self, refusal: Refusal) -> None:
        error = {"message": refusal.message, "type": "error", "param": None, "code": refusal.code}
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


def _chunk(delta: Mapping[str, Any], finish_reason: Optional[str] = None) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})
