"""Bodies whose parsing would block the event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_service_helpers import PATH, CountingEngine, fake_app, fake_service

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.middleware import json_size

MIB = 2**20
IMAGE = json.dumps({"url": "data:image/png;base64," + "A/+a" * 5 * MIB}).encode()


@pytest.mark.parametrize(
    "body",
    [
        IMAGE,
        IMAGE.replace(b"/", rb"\/"),  # as PHP writes it
        json.dumps({"prompt": [[151643] * 8191] * 8}).encode(),
        json.dumps({"prompt": '[],{}"\\' * 10000}, indent=100).encode(),
    ],
    ids=["image", "image with escapes", "token ids", "text"],
)
def test_typical_bodies_are_parsed(body: bytes) -> None:
    json_size.check_size(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * MIB + b"1]",
        b'["a\\\\",' + b"{}," * MIB + b"1]",
        b'["a\\\\\\",' + b'",' + b"1," * MIB + b"1]",
        json.dumps({str(i): 1 for i in range(70_000)}).encode(),
        b"[" + b",".join([b"9" * 4000] * 300) + b"]",
        b" " * 2 * MIB + b"1",
    ],
    ids=["lists", "after an escape", "after a quotation mark", "names", "numbers", "nothing"],
)
def test_slow_bodies_are_refused(body: bytes) -> None:
    async def post() -> httpx.Response:
        engine = CountingEngine()
        await engine.start()
        transport = httpx.ASGITransport(fake_app(fake_service(engine)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(PATH, content=body, headers={"Content-Type": "application/json"})

    answer = asyncio.run(post())
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("request_too_large", None)
    assert "which no prompt needs" in error["message"]


VALUES: Any = st.recursive(
    st.integers() | st.booleans() | st.text() | st.text('\\"a/'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('\\"a/'), inner),
)


@given(VALUES, st.booleans())
def test_only_characters_outside_of_strings_count(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    outside, inside, escaped = 0, False, False
    for byte in body.decode():
        if escaped:
            escaped = False
        elif inside and byte == "\\":
            escaped = True
        elif byte == '"':
            inside = not inside
        elif not inside:
            outside += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_size, "_MAX_OUTSIDE_BYTES", outside)
        json_size.check_size(body)
        patch.setattr(json_size, "_MAX_OUTSIDE_BYTES", outside - 1)
        with pytest.raises(ApiError):
            json_size.check_size(body)
