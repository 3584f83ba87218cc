"""Requests that end early: disconnects, timeouts, exit of the engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading

import httpx
import openai
import pytest
from executors import script_completion
from serve_openai_helpers import NAME, chat, demo_question, question, wait_for

from paddlemix_qwenvl_plugin.util.errors import QwenVLError

pytest_plugins = ("serve_openai_fixtures",)


@pytest.fixture
def slow_completion(server, monkeypatch):
    """Make every completion 2000 tokens long, at 10 ms per token; each test ends it early."""
    tokenizer = server.service.tokenizer
    script_completion(server.engine.vl, monkeypatch, tokenizer.encode("on and on ")[:1] * 2000)
    server.engine.step_seconds = 0.01
    yield
    for stream in server.engine.submitted:
        stream.cancel()
    server.wait_until_idle()


def check_cancelled(server, n_completions=1):
    """Check that all completions were cancelled before 1500 of their 2000 tokens were generated."""
    server.wait_until_idle()
    assert len(server.engine.submitted) == n_completions
    for stream in server.engine.submitted:
        assert stream.generation.finish_reason == "cancelled"
        assert len(stream.generation.tokens) < 1500


def test_closing_a_stream_cancels_its_completion(server, slow_completion):
    stream = chat(server, question("?"), stream=True, max_tokens=2000)
    for _ in range(3):
        next(stream)
    assert server.admission.slots_in_use == 1
    stream.close()
    check_cancelled(server)


def test_closing_a_stream_cancels_all_choices(server, slow_completion):
    stream = chat(server, question("?"), stream=True, max_tokens=2000, n=3)
    seen = set()
    for chunk in stream:
        seen.add(chunk.choices[0].index)
        if seen == {0, 1, 2}:
            break
    stream.close()
    check_cancelled(server, 3)


def test_client_timeout_without_streaming_cancels_all_choices(server, slow_completion):
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/chat/completions",
            json={"model": NAME, "messages": question("?"), "max_tokens": 2000, "n": 2},
            timeout=0.5,
        )
    check_cancelled(server, 2)


def test_client_disconnects_while_its_image_is_loaded(server, monkeypatch):
    loading = threading.Event()

    async def load_slowly(url, param):
        loading.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(server.images, "load", load_slowly)
    content, _ = demo_question("caption")
    body = {"model": NAME, "messages": [{"role": "user", "content": content}], "stream": True}
    send_and_disconnect(server, body, loading)
    server.wait_until_idle()
    assert not server.engine.submitted


def send_and_disconnect(server, body, event):
    """Send a request and close the connection when the event is set."""
    content = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert event.wait(30)


def test_running_timeout_without_streaming(server, slow_completion, change_settings):
    change_settings(running_timeout=0.3)
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), max_tokens=2000)
    assert error.value.status_code == 504
    assert error.value.code == "timeout"
    assert error.value.response.headers["x-should-retry"] == "false"
    check_cancelled(server)


def test_running_timeout_includes_loading_images(server, change_settings, monkeypatch):
    change_settings(running_timeout=0.1)
    load = server.images.load

    async def load_slowly(url, param):
        await asyncio.sleep(0.5)
        return await load(url, param)

    monkeypatch.setattr(server.images, "load", load_slowly)
    content, _ = demo_question("caption")
    with pytest.raises(openai.InternalServerError, match=r"after 0\.1 seconds, before .* images"):
        chat(server, [{"role": "user", "content": content}])
    assert not server.engine.submitted


def test_running_timeout_in_a_stream(server, slow_completion, change_settings):
    """The client receives the text so far, then an error and no finish reason."""
    change_settings(running_timeout=2)
    stream = chat(server, question("?"), stream=True, max_tokens=2000)
    chunks = [next(stream)]
    with pytest.raises(openai.APIError, match="timed out after 2 seconds"):
        chunks += stream
    assert len(chunks) > 3
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks)
    check_cancelled(server)


def test_engine_dies_during_a_stream(server, slow_completion):
    lines = []
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={"model": NAME, "messages": question("?"), "stream": True, "max_tokens": 2000},
    ) as response:
        for line in response.iter_lines():
            if line:
                lines.append(line)
            if len(lines) == 3:
                server.engine.die()
    assert response.status_code == 200
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert error["code"] == "engine_unavailable"
    assert sum('"error"' in line for line in lines) == 1
    assert "data: [DONE]" not in lines


@pytest.mark.parametrize("stream", [False, True])
def test_engine_dies_before_the_first_token(server, slow_completion, stream):
    server.engine.may_step.clear()

    def die_after_submission():
        wait_for(lambda: server.engine.submitted)
        server.engine.die()

    thread = threading.Thread(target=die_after_submission)
    thread.start()
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), max_tokens=2000, stream=stream)
    assert (error.value.status_code, error.value.code) == (503, "engine_unavailable")
    thread.join()
    server.engine.may_step.set()


@pytest.mark.parametrize("stream", [False, True])
def test_engine_unavailable(server, stream):
    server.engine.unavailable = True
    with pytest.raises(openai.InternalServerError) as error:
        chat(server, question("?"), stream=stream)
    assert error.value.status_code == 503
    assert error.value.code == "engine_unavailable"
    assert error.value.response.headers["retry-after"]
    assert not server.admission.slots_in_use


def test_failure_of_one_choice_cancels_the_others(server, slow_completion):
    stream = chat(server, question("?"), stream=True, max_tokens=2000, n=3)
    seen = set()
    while seen != {0, 1, 2}:
        seen.add(next(stream).choices[0].index)
    server.engine.submitted[1].put(QwenVLError("out of memory"))
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    check_cancelled(server, 3)
