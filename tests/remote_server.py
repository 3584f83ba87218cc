"""Scripted OpenAI-compatible server that records its requests, for tests of `chat --url` and `batch --url`."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Optional, Union

MODEL = "qwen-vl-chat"


class Reply(NamedTuple):
    """Scripted completion with its finish reason and token usage."""

    text: str
    finish_reason: str
    usage: dict[str, int]


Answer = Callable[[dict[str, Any]], Union[str, Reply]]


class FakeServer(ThreadingHTTPServer):
    """Scripted server.

    Attributes:
        answer: maps a request body to a Reply, or to a text; a text has the finish reason "stop" and the token usage
            of `usage`.
        refuse: maps path and body to (status, error, headers) of an error response, or to None to accept the request.
        requests: (path, body) of each accepted POST request.
        disconnected: semaphore, released once for each client that disconnects during a stream.
        resume: while cleared, streams pause after their first text.
        truncate: close streams after their first text.
        key: required API key, if any.
        n_concurrent, max_concurrent: number of requests being answered, now and at most.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Answer = lambda body: f"You said {last_text(body)}."
        self.refuse: Callable[[str, dict[str, Any]], Optional[tuple[int, Any, dict[str, str]]]] = (
            lambda path, body: None
        )
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.disconnected = threading.Semaphore(0)
        self.resume = threading.Event()
        self.resume.set()
        self.truncate = False
        self.key: Optional[str] = None
        self.n_concurrent = 0
        self.max_concurrent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body in self.requests]


@contextlib.contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.resume.set()
        server.shutdown()


def last_text(body: dict[str, Any]) -> str:
    """Return the text of the last message, or of the prompt."""
    content = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return "".join(part["text"] for part in content if part["type"] == "text")


def images(content: Any) -> list[bytes]:
    """Decode the data: URLs of a content's images."""
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
            self.server.requests.append((self.path, body))
            self.server.n_concurrent += 1
            self.server.max_concurrent = max(self.server.n_concurrent, self.server.max_concurrent)
        try:
            result = self.server.answer(body)
            reply = result if isinstance(result, Reply) else Reply(result, "stop", usage(result))
            if body.get("stream"):
                self._stream(reply)
                return
            content = {"message": {"content": reply.text}} if "messages" in body else {"text": reply.text}
            choice = {"index": 0, "finish_reason": reply.finish_reason, **content}
            self._json(200, {"choices": [choice], "usage": reply.usage})
        finally:
            with self.server.lock:
                self.server.n_concurrent -= 1

    def _refused(self, path: str, body: dict[str, Any]) -> bool:
        refusal = self.server.refuse(path, body)
        if self.server.key is not None and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            refusal = 401, {"message": "wrong API key"}, {}
        if refusal is None:
            return False
        status, error, headers = refusal
        self._json(status, {"error": error}, headers)
        return True

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        texts = [reply.text[i : i + 3] for i in range(0, len(reply.text), 3)]
        deltas: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}]
        deltas += [{"delta": {"content": text}} for text in texts]
        deltas.append({"delta": {"boxes": []}, "finish_reason": reply.finish_reason})
        try:
            self.wfile.write(b": a comment\r\n\r\n")
            for number, delta in enumerate(deltas):
                self._event({"choices": [{"index": 0, "finish_reason": None, **delta}]})
                if number == 1:  # the first delta with text
                    if self.server.truncate:
                        return
                    while not self.server.resume.wait(0.05):
                        self.wfile.write(b": still here\n\n")
            self._event({"choices": [], "usage": reply.usage})
            self.wfile.write(b"data: [DONE]\n\n")
        except ConnectionError:
            self.server.disconnected.release()

    def _event(self, values: dict[str, Any]) -> None:
        # Some servers do not escape to ASCII. The client must not take U+2028 for the end of a line.
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
    """Token usage of a text: 7 prompt tokens, one token per character, one stop token."""
    return {"prompt_tokens": 7, "completion_tokens": len(text) + 1, "total_tokens": len(text) + 8}
