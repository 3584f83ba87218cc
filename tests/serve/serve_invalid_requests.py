"""Invalid requests, with the expected status and error code.

test_serve_soak.py sends all at once. The clients of serve_load.py, also used by test_serve_kills.py, send some of them
under load.
"""

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

# Settings of a server for these requests: a low limit of the body size, which a test can exceed quickly.
FLAGS = ("--max_body_bytes", 2**20)

_CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class InvalidRequest:
    """Invalid request; `send` sends it and describes what is wrong with the response, None if nothing is."""

    name: str
    send: Callable[[httpx.AsyncClient], Awaitable[Optional[str]]]


def _body(
    name: str,
    content: Union[bytes, Callable[[], bytes]],
    status: int,
    code: Optional[str],
    path: str = _CHAT_PATH,
) -> InvalidRequest:
    """Request with this body; a function makes a large body when it is first needed."""
    cached: list[bytes] = []

    async def send(http: httpx.AsyncClient) -> Optional[str]:
        if not cached:
            cached.append(content() if callable(content) else content)
        headers = {"Content-Type": "application/json"}
        return _problem(await http.post(path, content=cached[0], headers=headers), status, code)

    return InvalidRequest(name, send)


def _problem(response: httpx.Response, status: int, code: Optional[str]) -> Optional[str]:
    """How a response differs from an error with this status and code; None if it does not."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}, no error object: {response.text[:200]}"
    if (response.status_code, error["code"]) == (status, code) and error["message"]:
        return None
    return f"status {response.status_code}, error {error}; expected {status} {code}"


def _chat(
    name: str, code: Optional[str], status: int = 400, messages: Any = None, **parameters: Any
) -> InvalidRequest:
    body = {"model": NAME, "messages": question("?") if messages is None else messages, **parameters}
    return _body(name, json.dumps(body).encode(), status, code)


def _image(name: str, url: str, code: str) -> InvalidRequest:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    # With `stream` too, the response has the status of the error: images are loaded before the stream begins.
    return _chat(name, code, messages=[{"role": "user", "content": content}], stream=True)


def _data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _png(width: int, height: int) -> bytes:
    """PNG with this size in its header, but only the pixels of an 8 x 8 image."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    data = bytearray(image.getvalue())
    # Bytes of the file: the type of the IHDR chunk from 12 on, width and height from 16, the chunk's checksum from 29.
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


async def _slow_body(http: httpx.AsyncClient) -> Optional[str]:
    """Send the beginning of a body; the server must wait at least 3 s for the remainder."""
    reader, writer = await _connect(http)
    try:
        writer.write(_head("Content-Length: 1000") + b"{")
        with contextlib.suppress(asyncio.TimeoutError):
            response = await asyncio.wait_for(reader.read(65536), 3)
            return f"response within 3 s: {response[:100]!r}"
        return None
    finally:
        writer.close()


async def _incomplete_body(http: httpx.AsyncClient) -> Optional[str]:
    """Disconnect after the beginning of a body."""
    _, writer = await _connect(http)
    writer.write(_head("Content-Length: 1000") + b'{"model": ')
    await writer.drain()
    writer.close()
    return None


async def _not_http(http: httpx.AsyncClient) -> Optional[str]:
    """Send bytes that are not HTTP; the server answers with status 400 or closes the connection."""
    reader, writer = await _connect(http)
    try:
        writer.write(bytes(range(256)) + b"\r\n\r\n")
        response = await reader.read(65536)
        return None if response[:13] in (b"", b"HTTP/1.1 400 ") else f"status {response[9:12]!r}"
    except ConnectionResetError:
        return None
    finally:
        writer.close()


async def _connect(http: httpx.AsyncClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(http.base_url.host, http.base_url.port)


def _head(*headers: str) -> bytes:
    """Request line and headers of a chat completion request."""
    lines = (f"POST {_CHAT_PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "\r\n".join([*lines, "", ""]).encode()


async def _no_content_type(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.post(_CHAT_PATH, content=b"hello"), 415, "unsupported_media_type")


async def _wrong_method(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.get(_CHAT_PATH), 405, "method_not_allowed")


async def _unknown_path(http: httpx.AsyncClient) -> Optional[str]:
    return _problem(await http.post("/v2/%00..%2fetc", json={}), 404, "not_found")


# A case of _body, _chat or _image has a name, an invalid body, parameter or image URL, and the code of the expected
# error. Where no status is given, it is 400.
INVALID_REQUESTS = (
    _body("not JSON", b'{"model": "qwen', 400, "invalid_json"),
    _body("not UTF-8", b'{"model": "\xff"}', 400, "invalid_json"),
    _body("not an object", b"[1, 2]", 400, "invalid_type"),
    _body("empty body", b"", 400, "missing_required_parameter"),
    _body("nested too deeply", b'{"messages":' + b"[" * 5000, 400, "invalid_json"),
    _body("body too large", lambda: b" " * (2**20 + 1), 413, "request_too_large"),
    _body("body three times too large", lambda: b" " * (3 * 2**20), 413, "request_too_large"),
    _body("tokenize", b'{"messages": 7}', 400, "invalid_type", "/tokenize"),
    _chat("temperature", "invalid_value", temperature=99),
    _chat("n", "invalid_value", n=0),
    _chat("too many tokens", "invalid_value", max_tokens=10**9),
    _chat("unknown parameter", "unknown_parameter", banana=1),
    _chat("tools", "unsupported_parameter", tools=[{"type": "function"}]),
    _chat("another model", "model_not_found", 404, model="gpt-4"),
    _chat("no messages", "invalid_value", messages=[]),
    _chat("no user message", "invalid_value", messages=[{"role": "assistant", "content": "hi"}]),
    _chat("image tag in a text", "invalid_value", messages=question("<img>/etc/passwd</img>")),
    _chat("long prompt", "context_length_exceeded", messages=question("word " * 20000)),
    _image("file URL", "file:///etc/passwd", "invalid_image_url"),
    _image("host that is not allowed", "http://169.254.169.254/latest", "image_host_not_allowed"),
    _image("not base64", "data:image/png;base64,!!!", "invalid_image"),
    _image("not an image", _data_url(b"hello" * 100), "invalid_image"),
    _image("truncated image", _data_url(_png(8, 8)[:40]), "invalid_image"),
    _image("too many pixels", _data_url(_png(60000, 60000)), "image_too_large"),
    _image("fewer pixels than in the header", _data_url(_png(2000, 2000)), "invalid_image"),
    InvalidRequest("slow body", _slow_body),
    InvalidRequest("incomplete body", _incomplete_body),
    InvalidRequest("not HTTP", _not_http),
    InvalidRequest("no content type", _no_content_type),
    InvalidRequest("wrong method", _wrong_method),
    InvalidRequest("unknown path", _unknown_path),
)
