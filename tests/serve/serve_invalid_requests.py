"""Invalid requests and their expected responses."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import httpx
from PIL import Image
from serve_openai_helpers import NAME, question

# Server settings for these requests: a low body limit, which a test can exceed quickly.
FLAGS = ("--max_body_bytes", 2**20)

_CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class InvalidRequest:
    """Invalid request; `send` returns the problem of the reply, if any."""

    name: str
    send: Callable[[httpx.AsyncClient], Awaitable[Optional[str]]]


def _body(
    name: str, content: Union[bytes, Callable[[], bytes]], status: int, code: Optional[str], path: str = _CHAT
) -> InvalidRequest:
    made: list[bytes] = []

    async def send(http: httpx.AsyncClient) -> Optional[str]:
        if not made:
            made.append(content() if callable(content) else content)
        headers = {"Content-Type": "application/json"}
        return _problem(await http.post(path, content=made[0], headers=headers), status, code)

    return InvalidRequest(name, send)


def _problem(response: httpx.Response, status: int, code: Optional[str]) -> Optional[str]:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}, no error object: {response.text[:200]}"
    if (response.status_code, error["code"]) == (status, code) and error["message"]:
        return None
    return f"status {response.status_code}, error {error}; should be {status} {code}"


def _chat(
    name: str, code: Optional[str], status: int = 400, messages: Any = None, **changed: Any
) -> InvalidRequest:
    body = {"model": NAME, "messages": question("?") if messages is None else messages, **changed}
    return _body(name, json.dumps(body).encode(), status, code)


def _image(name: str, url: str, code: str) -> InvalidRequest:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    return _chat(name, code, messages=[{"role": "user", "content": content}], stream=True)


def _url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _png(width: int, height: int) -> bytes:
    """PNG with this size in its header and few pixels."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    data = bytearray(image.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


async def _slow(http: httpx.AsyncClient) -> Optional[str]:
    """Body that is sent slowly."""
    reader, writer = await _connect(http)
    try:
        writer.write(_head("Content-Length: 1000") + b"{")
        with contextlib.suppress(asyncio.TimeoutError):
            answer = await asyncio.wait_for(reader.read(65536), 3)
            return f"answered too soon: {answer[:100]!r}"
        return None
    finally:
        writer.close()


async def _left(http: httpx.AsyncClient) -> Optional[str]:
    """Client that disconnects within its body."""
    _, writer = await _connect(http)
    writer.write(_head("Content-Length: 1000") + b'{"model": ')
    await writer.drain()
    writer.close()
    return None


async def _noise(http: httpx.AsyncClient) -> Optional[str]:
    """Bytes that are not HTTP."""
    reader, writer = await _connect(http)
    try:
        writer.write(bytes(range(256)) + b"\r\n\r\n")
        answer = await reader.read(65536)
        return None if answer[:13] in (b"", b"HTTP/1.1 400 ") else f"status {answer[9:12]!r}"
    except ConnectionResetError:
        return None
    finally:
        writer.close()


async def _connect(http: httpx.AsyncClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(http.base_url.host, http.base_url.port)


def _head(*headers: str) -> bytes:
    lines = (f"POST {_CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join([*lines, "", ""]).encode()


async def _text(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.post(_CHAT, content=b"hello"), 415, "unsupported_media_type")


async def _get(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.get(_CHAT), 405, "method_not_allowed")


async def _lost(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.post("/v2/%00..%2fetc", json={}), 404, "not_found")


INVALID_REQUESTS = (
    _body("no JSON", b'{"model": "qwen', 400, "invalid_json"),
    _body("no UTF-8", b'{"model": "\xff"}', 400, "invalid_json"),
    _body("no object", b"[1, 2]", 400, "invalid_type"),
    _body("nothing", b"", 400, "missing_required_parameter"),
    _body("too deep", b'{"messages":' + b"[" * 5000, 400, "invalid_json"),
    _body("too long", lambda: b" " * (2**20 + 1), 413, "request_too_large"),
    _body("twice too long", lambda: b" " * (3 * 2**20), 413, "request_too_large"),
    _body("another path", b'{"messages": 7}', 400, "invalid_type", "/tokenize"),
    _chat("temperature", "invalid_value", temperature=99),
    _chat("n", "invalid_value", n=0),
    _chat("too many", "invalid_value", max_tokens=10**9),
    _chat("no parameter", "unknown_parameter", banana=1),
    _chat("tools", "unsupported_parameter", tools=[{"type": "function"}]),
    _chat("another model", "model_not_found", 404, model="gpt-4"),
    _chat("no message", "invalid_value", messages=[]),
    _chat("no user", "invalid_value", messages=[{"role": "assistant", "content": "hi"}]),
    _chat("a tag", "invalid_value", messages=question("<img>/etc/passwd</img>")),
    _chat("a long prompt", "context_length_exceeded", messages=question("word " * 20000)),
    _image("a file", "file:///etc/passwd", "invalid_image_url"),
    _image("another host", "http://169.254.169.254/latest", "image_host_not_allowed"),
    _image("no base64", "data:image/png;base64,!!!", "invalid_image"),
    _image("no image", _url(b"hello" * 100), "invalid_image"),
    _image("half an image", _url(_png(8, 8)[:40]), "invalid_image"),
    _image("too many pixels", _url(_png(60000, 60000)), "image_too_large"),
    _image("less than it says", _url(_png(2000, 2000)), "invalid_image"),
    InvalidRequest("a slow body", _slow),
    InvalidRequest("half a body", _left),
    InvalidRequest("no HTTP", _noise),
    InvalidRequest("text", _text),
    InvalidRequest("a method", _get),
    InvalidRequest("a path", _lost),
)
