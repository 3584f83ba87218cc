"""Scripted OpenAI-compatible server for tests, which records its requests."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional, Union

MODEL = "qwen-vl-chat"


class Said(NamedTuple):
    """Answer with its finish reason and usage."""

    text: str
    finish_reason: str
    usage: dict[str, int]


Answer = Callable[[dict[str, Any]], Union[str, Said]]


class FakeServer(ThreadingHTTPServer):
    """Scripted server.

    Attributes:
        answer: function of a request's body that returns an answer, or the text of a complete one.
        refuse: function of path and body that returns status, error and headers of an error response, or None.
        asked: (path, body) of each request that was not refused.
        gone: released for each client that disconnects in a stream.
        go_on: while it is not set, streams wait after their first delta.
        cut: close streams after their first delta.
        key: the required API key.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Answer = lambda body: f"You said {last_text(body)}."
        self.refuse: Callable[[str, dict[str, Any]], Optional[tuple[int, Any, dict[str, str]]]] = (
            lambda path, body: None
        )
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.gone = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.cut = False
        self.key: Optional[str] = None
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body in self.asked]


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def last_text(body: dict[str, Any]) -> str:
    """The text of the last message, or of the prompt."""
    content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return "".join(part["text"] for part in content if part["type"] == "text")


def images(content: Any) -> list[bytes]:
    """Encoded images of a content."""
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    for url in urls:
        assert url.startswith("data:image/"), url[:40]
    return [base64.b64decode(url.partition(";base64,")[2]) for url in urls]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        if not self._refused(self.path, {}):
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused(self.path, body):
            return
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.at_once, self.server.most_at_once)
        try:
            given = self.server.answer(body)
            said = given if isinstance(given, Said) else Said(given, "stop", usage(given))
            if body.get("stream"):
                self._stream(said)
                return
            text = {"message": {"content": said.text}} if "messages" in body else {"text": said.text}
            choice = {"index": 0, "finish_reason": said.finish_reason, **text}
            self._json(200, {"choices": [choice], "usage": said.usage})
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _refused(self, path: str, body: dict[str, Any]) -> bool:
        refusal = self.server.refuse(path, body)
        if self.server.key is not None and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            refusal = 401, {"message": "wrong API key"}, {}
        if refusal is None:
            return False
        status, error, headers = refusal
        self._json(status, {"error": error}, headers)
        return True

    def _stream(self, said: Said) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        texts = [said.text[i : i + 3] for i in range(0, len(said.text), 3)]
        deltas: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}]
        deltas += [{"delta": {"content": text}} for text in texts]
        deltas.append({"delta": {"boxes": []}, "finish_reason": said.finish_reason})
        try:
            self.wfile.write(b": a comment\r\n\r\n")
            for number, delta in enumerate(deltas):
                self._event({"choices": [{"index": 0, "finish_reason": None, **delta}]})
                if number == 1:
                    if self.server.cut:
                        return
                    while not self.server.go_on.wait(0.05):
                        self.wfile.write(b": still here\n\n")
            self._event({"choices": [], "usage": said.usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.server.gone.release()

    def _event(self, values: dict[str, Any]) -> None:
        # Without escapes, as some servers write JSON: U+2028 stays unescaped.
        self.wfile.write(b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n")

    def _json(self, status: int, values: Any, headers: Optional[dict[str, str]] = None) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def usage(text: str) -> dict[str, int]:
    """Usage of an answer: 7 prompt tokens, one token per character, one stop token."""
    return {"prompt_tokens": 7, "completion_tokens": len(text) + 1, "total_tokens": len(text) + 8}
