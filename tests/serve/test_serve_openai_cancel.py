"""Requests that end early: disconnects, timeouts, exit of the engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import httpx
import openai
import pytest
from executors import say
from serve_openai_helpers import NAME, chat, demo_question, question, wait_for

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

pytest_plugins = ("serve_openai_fixtures",)


@pytest.fixture
def endless(server, monkeypatch):
    """Let the model generate 2000 tokens, one every 10 ms: no test waits for them."""
    tokenizer = server.service.tokenizer
    say(server.engine.vl, monkeypatch, tokenizer.encode("on and on ")[:1] * 2000)
    server.engine.step_seconds = 0.01
    yield
    for stream in server.engine.submitted:
        stream.cancel()
    server.wait_until_idle()


def cancelled_soon(server, n=1):
    server.wait_until_idle()
    assert len(server.engine.submitted) == n
    for stream in server.engine.submitted:
        assert stream.generation.finish_reason == "cancelled"
        assert len(stream.generation.tokens) < 1500


def test_closing_a_stream_frees_the_request(server, endless):
    stream = chat(server, question("?"), stream=True, max_tokens=2000)
    for _, _ in zip(range(3), stream):
        pass
    assert server.admission.held == 1
    stream.close()
    cancelled_soon(server)


def test_closing_a_stream_frees_all_choices(server, endless):
    stream = chat(server, question("?"), stream=True, max_tokens=2000, n=3)
    seen = set()
    for chunk in stream:
        seen.add(chunk.choices[0].index)
        if seen == {0, 1, 2}:
            break
    stream.close()
    cancelled_soon(server, 3)


def test_a_client_that_does_not_wait_for_a_whole_answer(server, endless):
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/chat/completions",
            json={"model": NAME, "messages": question("?"), "max_tokens": 2000, "n": 2},
            timeout=0.5,
        )
    cancelled_soon(server, 2)


def test_a_client_that_disconnects_before_the_first_token(server, monkeypatch):
    """While its image is loaded."""
    waiting = threading.Event()

    async def stuck(url, param):
        waiting.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(server.images, "load", stuck)
    content, _ = demo_question("caption")
    abandon(
        server, {"model": NAME, "messages": [{"role": "user", "content": content}], "stream": True}, waiting
    )
    server.wait_until_idle()
    assert not server.engine.submitted


def abandon(server, body, when):
    """Send a request and close the connection when `when` is set."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert when.wait(30)


def test_a_whole_answer_takes_too_long(server, endless, limited):
    limited(running_timeout=0.3)
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), max_tokens=2000)
    assert error.value.status_code == 504
    assert error.value.code == "timeout"
    assert error.value.response.headers["x-should-retry"] == "false"
    cancelled_soon(server)


def test_images_take_too_long(server, limited, monkeypatch):
    """The time for a request begins with them."""
    limited(running_timeout=0.1)
    load = server.images.load

    async def slow(url, param):
        await asyncio.sleep(0.5)
        return await load(url, param)

    monkeypatch.setattr(server.images, "load", slow)
    content, _ = demo_question("caption")
    with pytest.raises(openai.InternalServerError, match=r"timed out after 0\.1 seconds"):
        chat(server, [{"role": "user", "content": content}])
    assert not server.engine.submitted


def test_a_stream_takes_too_long(server, endless, limited):
    """The partial text is delivered; the error marks it as incomplete."""
    limited(running_timeout=2)
    stream = chat(server, question("?"), stream=True, max_tokens=2000)
    chunks = [next(stream)]
    with pytest.raises(openai.APIError, match="timed out after 2 seconds"):
        chunks += stream
    assert len(chunks) > 3
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)
    cancelled_soon(server)


def test_the_engine_dies_in_a_stream(server, endless):
    lines = []
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": NAME, "messages": question("?"), "stream": True, "max_tokens": 2000},
    ) as response:
        for line in response.iter_lines():
            lines += [line] if line else []
            if len(lines) == 3:
                server.engine.die()
    assert response.status_code == 200
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "engine_unavailable"
    assert sum('"error"' in line for line in lines) == 1
    assert "data: [DONE]" not in lines


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_dies_before_the_first_token(server, endless, stream):
    server.engine.going.clear()

    def die():
        wait_for(lambda: server.engine.submitted)
        server.engine.die()

    thread = threading.Thread(target=die)
    thread.start()
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), max_tokens=2000, stream=stream)
    assert (error.value.status_code, error.value.code) == (503, "engine_unavailable")
    thread.join()
    server.engine.going.set()


@pytest.mark.parametrize("stream", [False, True])
def test_no_engine(server, stream):
    server.engine.dead = True
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), stream=stream)
    assert error.value.status_code == 503
    assert error.value.code == "engine_unavailable"
    assert error.value.response.headers["retry-after"]
    assert not server.admission.held


def test_one_choice_fails_and_all_end(server, endless):
    stream = chat(server, question("?"), stream=True, max_tokens=2000, n=3)
    seen = set()
    while seen != {0, 1, 2}:
        seen.add(next(stream).choices[0].index)
    server.engine.submitted[1].put(QwenVLError("out of memory"))
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    cancelled_soon(server, 3)
