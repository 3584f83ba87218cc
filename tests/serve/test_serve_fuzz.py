"""Random requests generated from the OpenAPI document: no status from 500 on, no hang, errors in OpenAI's format.

QWENVL_TEST_FUZZ_SECONDS sets the duration (default 20; longer if one round over all operations takes longer),
QWENVL_TEST_FUZZ_SEED the seed of the requests (default 0).
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
from serve_process import ServerProcess, checked_records, metrics, wait_until_idle

from paddlemix_qwenvl_plugin.demo.questions import IMAGES

if sys.version_info < (3, 10):
    pytest.skip("schemathesis needs Python 3.10", allow_module_level=True)
schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis: pip install -e '.[dev]'")

requests = pytest.importorskip("requests")  # a dependency of schemathesis

pytestmark = needs_compiler

SECONDS = float(os.environ.get("QWENVL_TEST_FUZZ_SECONDS") or 20)
SEED = int(os.environ.get("QWENVL_TEST_FUZZ_SEED") or 0)

# Completions are short, since their text is not checked.
FLAGS = ("--max_new_tokens", 6, "--max_running", 8, "--image_workers", 1)
TIMEOUT = 60.0  # seconds for a response
BATCH = 15  # number of requests of a batch, which has one operation and one seed

IMAGE = data_url(IMAGES / "locate.png")


def _make_likely_valid(body: Any, data: Any) -> None:
    """Correct the parameters that make most random bodies invalid, so that the server accepts some requests."""
    if not isinstance(body, dict):
        return
    body.update(_with_integers(body), model=NAME)
    for name, maximum in (("max_tokens", 6), ("max_completion_tokens", 6), ("min_tokens", 3), ("n", 3)):
        if body.get(name) is not None and data.draw(st.integers(0, 3)):
            body[name] = data.draw(st.integers(1, maximum))
    if data.draw(st.booleans()):
        body.pop("max_completion_tokens", None)
    if body.get("stream_options") and data.draw(st.booleans()):
        body["stream"] = True
    if body.get("top_logprobs") and data.draw(st.booleans()):
        body["logprobs"] = True
    messages = body.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        body["messages"] = _in_valid_order(messages, data)
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        body["prompt"] = [_as_text_tokens(item) for item in prompt]
    for part in _objects_with_url(body):
        if data.draw(st.integers(0, 3)):
            part["url"] = data.draw(st.sampled_from([IMAGE, IMAGE, IMAGE[:5000], "data:,", "http://[::1"]))


def _with_integers(value: Any) -> Any:
    """Value with integers in place of numbers like 1.0, which are integers in JSON Schema, but not for the server."""
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_text_tokens(value: Any) -> Any:
    """Value with all integers in the range of text tokens."""
    if isinstance(value, list):
        return [_as_text_tokens(item) for item in value]
    return value % 250 if isinstance(value, int) else value


def _in_valid_order(messages: list[dict[str, Any]], data: Any) -> list[dict[str, Any]]:
    """Valid order of a chat: system, a user message, all other messages, a user message; only users send images."""
    system = [message for message in messages if message.get("role") in ("system", "developer")]
    others = [message for message in messages if message not in system]
    for message in [*system, *others]:
        if message.get("role") != "user" and _objects_with_url(message):
            message["content"] = "words"
    images = [{"type": "image_url", "image_url": {"url": IMAGE}}] * data.draw(st.integers(0, 2))
    last = {"role": "user", "content": [*images, {"type": "text", "text": "?"}]}
    return [*system, {"role": "user", "content": "?"}, *others, last]


def _objects_with_url(value: Any) -> list[dict[str, Any]]:
    """All objects in a body that have a field `url`."""
    if isinstance(value, list):
        return [found for item in value for found in _objects_with_url(item)]
    if isinstance(value, dict):
        nested = _objects_with_url(list(value.values()))
        return [value, *nested] if "url" in value else nested
    return []


def _check(case: Any, response: Any) -> None:
    """Raise AssertionError unless the response is an answer, or an error below status 500 in OpenAI's format."""
    details = f"{case.method} {case.formatted_path} {case.body!r:.2000}: {response.status_code} {response.text:.500}"
    assert response.status_code < 500, details
    if response.status_code >= 400:
        (error,) = json.loads(response.content).values()
        assert set(error) == {"message", "type", "param", "code"}, details
        assert error["message"], details
        assert "\n" not in error["message"], details
        assert error["code"] or error["type"], details
    elif response.headers["content-type"].startswith("text/event-stream"):
        *events, done, end = response.content.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", ""), details
        assert not any("error" in json.loads(event[len("data: ") :]) for event in events), details
    elif case.operation.path.startswith("/v1/"):
        case.operation.validate_response(schemathesis.Response.from_requests(response, verify=True))


def _send_batch(operation: Any, mode: Any, batch_seed: int, statuses: Counter[str]) -> None:
    """Send random requests for an operation and count their statuses; a failure shows the shortest request."""

    @seed(batch_seed)
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
            _make_likely_valid(case.body, data)
        # Not case.call, which reads only the beginning of a stream.
        response = requests.request(**case.as_transport_kwargs(), timeout=TIMEOUT)
        _check(case, response)
        statuses[f"{case.method} {operation.path} {response.status_code}"] += 1

    check()


def test_random_requests(
    serve_demo: Callable[..., ServerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve_demo(*FLAGS)
    url = server.wait_until_ready()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
    }
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    others = [operation for operation in operations if operation.method.upper() != "POST"]
    # Most batches are for operations that read a body: twice in each mode (valid and invalid data).
    modes = list(schemathesis.GenerationMode)
    batches = [(operation, mode) for operation in posts for mode in modes] * 2
    batches += [(operation, modes[0]) for operation in others]
    statuses: Counter[str] = Counter()

    end, first_seed = time.monotonic() + SECONDS, SEED * 10**6
    batch_seed = first_seed
    while batch_seed < first_seed + len(batches) or time.monotonic() < end:
        _send_batch(*batches[batch_seed % len(batches)], batch_seed, statuses)
        batch_seed += 1
    with capsys.disabled():
        print(f"\n{sum(statuses.values())} requests:", dict(sorted(statuses.items())))
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        assert statuses[f"POST {path} 200"] > 0
        assert statuses[f"POST {path} 400"] > 0
    wait_until_idle(url)
    assert metrics(url)["qwenvl_engine_restarts_total"] == 0
    server.send_signal(signal.SIGTERM)
    code, log = server.wait_for_exit()
    assert code == 0
    checked_records(log)
