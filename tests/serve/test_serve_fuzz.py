"""Random requests generated from the OpenAPI document: never a 500, never a hang, each error in OpenAI's format.

QWENVL_TEST_FUZZ_SECONDS is how long it takes (20), QWENVL_TEST_FUZZ_SEED what is tried (0).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from engines import needs_compiler
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from serve_openai_helpers import NAME, data_url
from serve_process import ServerProcess, metrics, sound_log, wait_until_idle

from paddlemix_qwenvl_plugin.demo.questions import IMAGES

if sys.version_info < (3, 10):
    pytest.skip("schemathesis needs Python 3.10", allow_module_level=True)
schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis: pip install -e '.[dev]'")

requests = pytest.importorskip("requests")  # schemathesis has it

pytestmark = needs_compiler

SECONDS = float(os.environ.get("QWENVL_TEST_FUZZ_SECONDS") or 20)
SEED = int(os.environ.get("QWENVL_TEST_FUZZ_SEED") or 0)

# Completions are short; how they end is not the question here.
FLAGS = ("--max_new_tokens", 6, "--max_running", 8, "--image_workers", 1)
PATIENCE = 60.0  # seconds for any reply
BATCH = 15

IMAGE = data_url(IMAGES / "locate.png")


def _tame(body: Any, data: Any) -> None:
    """Fix the parameters by which most random bodies fail, so that later checks are reached as well."""
    if not isinstance(body, dict):
        return
    body.update(_whole(body), model=NAME)
    for name, most in (("max_tokens", 6), ("max_completion_tokens", 6), ("min_tokens", 3), ("n", 3)):
        if body.get(name) is not None and data.draw(st.integers(0, 3)):
            body[name] = data.draw(st.integers(1, most))
    if data.draw(st.booleans()):
        body.pop("max_completion_tokens", None)
    if body.get("stream_options") and data.draw(st.booleans()):
        body["stream"] = True
    if body.get("top_logprobs") and data.draw(st.booleans()):
        body["logprobs"] = True
    messages = body.get("messages")
    if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
        body["messages"] = _in_order(messages, data)
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        body["prompt"] = [_text_tokens(each) for each in prompt]
    for part in _image_urls(body):
        if data.draw(st.integers(0, 3)):
            part["url"] = data.draw(st.sampled_from([IMAGE, IMAGE, IMAGE[:5000], "data:,", "http://[::1"]))


def _whole(value: Any) -> Any:
    """Value without numbers like 1.0, which are integers in JSON Schema but not here."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text_tokens(value: Any) -> Any:
    if isinstance(value, list):
        return [_text_tokens(each) for each in value]
    return value % 250 if isinstance(value, int) else value


def _in_order(messages: list[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """Valid order of a chat: system messages, a user message, others, a user message."""
    system = [each for each in messages if each.get("role") in ("system", "developer")]
    others = [each for each in messages if each not in system]
    for message in [*system, *others]:
        if message.get("role") != "user" and _image_urls(message):
            message["content"] = "words"
    image = [{"type": "image_url", "image_url": {"url": IMAGE}}] * data.draw(st.integers(0, 2))
    last = {"role": "user", "content": [*image, {"type": "text", "text": "?"}]}
    return [*system, {"role": "user", "content": "?"}, *others, last]


def _image_urls(value: Any) -> list[dict[str, Any]]:
    """All objects with a `url` in a body."""
    if isinstance(value, list):
        return [found for each in value for found in _image_urls(each)]
    if isinstance(value, dict):
        return [*([value] if "url" in value else []), *_image_urls(list(value.values()))]
    return []


def _check(case: Any, response: Any) -> None:
    """Raise AssertionError unless this is an answer, or an error in OpenAI's format."""
    shown = f"{case.method} {case.formatted_path} {case.body!r:.2000}: {response.status_code} {response.text:.500}"
    assert response.status_code < 500, shown
    if response.status_code >= 400:
        (error,) = json.loads(response.content).values()
        assert set(error) == {"message", "type", "param", "code"}, shown
        assert error["message"], shown
        assert "\n" not in error["message"], shown
        assert error["code"] or error["type"], shown
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, done, end = response.content.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", ""), shown
        assert not any("error" in json.loads(event[len("data: ") :]) for event in events), shown
    elif case.operation.path.startswith("/v1/"):
        case.operation.validate_response(schemathesis.Response.from_requests(response, verify=True))


def _try(operation: Any, mode: Any, number: int, seen: Counter[str]) -> None:
    """Batch of requests for an operation; the traceback shows the shortest failing one."""

    @seed(number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: Any) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if data.draw(st.integers(0, 3)):
            _tame(case.body, data)
        # Not case.call, which reads the beginning of a stream only.
        response = requests.request(**case.as_transport_kwargs(), timeout=PATIENCE)
        _check(case, response)
        seen[f"{case.method} {operation.path} {response.status_code}"] += 1

    check()


def test_no_request_breaks_the_server(
    serve_demo: Callable[..., ServerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve_demo(*FLAGS)
    url = server.ready()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    assert {each.path for each in operations} >= {"/v1/chat/completions", "/v1/completions", "/tokenize"}
    # Most examples are for operations that read a body.
    modes = list(schemathesis.GenerationMode)
    tried = [(each, mode) for each in operations for mode in modes if each.method.upper() == "POST"] * 2
    tried += [(each, modes[0]) for each in operations if each.method.upper() != "POST"]
    seen: Counter[str] = Counter()

    end, first = time.monotonic() + SECONDS, SEED * 10**6
    number = first
    while number < first + len(tried) or time.monotonic() < end:
        _try(*tried[number % len(tried)], number, seen)
        number += 1
    with capsys.disabled():
        print(f"\n{sum(seen.values())} requests:", dict(sorted(seen.items())))
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert seen[f"POST {path} 200"] > 0
        assert seen[f"POST {path} 400"] > 0
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == 0
    server.send(signal.SIGTERM)
    code, log = server.end()
    assert code == 0
    sound_log(log)
