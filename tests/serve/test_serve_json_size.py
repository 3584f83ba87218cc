"""Two limits of a JSON body: its number of bytes outside of strings, and its number of quotation marks.

Parsing a body beyond these limits would block the event loop for too long.
"""

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
IMAGE_BODY = json.dumps({"url": "data:image/png;base64," + "A/+a" * 5 * MIB}).encode()


@pytest.mark.parametrize(
    "body",
    [
        IMAGE_BODY,
        IMAGE_BODY.replace(b"/", rb"\/"),  # PHP escapes slashes
        json.dumps({"prompt": [[151643] * 8191] * 8}).encode(),
        json.dumps({"prompt": '[],{}"\\' * 10000}, indent=100).encode(),
    ],
    ids=["image", "image with escapes", "token ids", "text"],
)
def test_typical_bodies_are_accepted(body: bytes) -> None:
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
    ids=[
        "lists",
        "after an escaped backslash",
        "after an escaped quotation mark",
        "names",
        "numbers",
        "spaces",
    ],
)
def test_bodies_that_are_slow_to_parse_are_refused(body: bytes) -> None:
    async def post() -> httpx.Response:
        engine = CountingEngine()
        await engine.start()
        transport = httpx.ASGITransport(fake_app(fake_service(engine)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(PATH, content=body, headers={"Content-Type": "application/json"})

    response = asyncio.run(post())
    assert response.status_code == 413
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("request_too_large", None)
    assert "which no prompt needs" in error["message"]


JSON_VALUES: Any = st.recursive(
    st.integers() | st.booleans() | st.text() | st.text('\\"a/'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('\\"a/'), inner),
)


@given(JSON_VALUES, st.booleans())
def test_only_characters_outside_of_strings_count(value: Any, ascii_only: bool) -> None:
    """The reference counts character by character; a limit at the count accepts the body, a lower limit refuses it."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    n_outside, in_string, escaped = 0, False, False
    for character in body.decode():
        if escaped:
            escaped = False
        elif in_string and character == "\\":
            escaped = True
        elif character == '"':
            in_string = not in_string
        elif not in_string:
            n_outside += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_size, "_MAX_BYTES_OUTSIDE_STRINGS", n_outside)
        json_size.check_size(body)
        patch.setattr(json_size, "_MAX_BYTES_OUTSIDE_STRINGS", n_outside - 1)
        with pytest.raises(ApiError):
            json_size.check_size(body)
