"""Invalid requests: OpenAI's error object with the right status, parameter and code."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import ValidationError
from serve_openai_helpers import NAME, chat, demo_question, question

from paddlemix_qwenvl_plugin.serve.errors import ApiError
from paddlemix_qwenvl_plugin.serve.openai.chat import ChatCompletionRequest
from paddlemix_qwenvl_plugin.serve.openai.completions import CompletionRequest

pytest_plugins = ("serve_openai_fixtures",)

TEXT_PART = {"type": "text", "text": "?"}
JSON_TYPE = "application/json"


def user_message(*parts):
    return [{"role": "user", "content": list(parts)}]


def image_part(url, **extra_fields):
    return {"type": "image_url", "image_url": {"url": url, **extra_fields}}


# Columns of the following tables:
# - changes to a valid request body; ... in place of a value removes the parameter
# - `param` of the expected error
# - `code` of the expected error
# - text that the message of the error must contain; "" accepts any message
INVALID_CHAT_REQUESTS = [
    ({"model": "gpt-4o"}, "model", "model_not_found", "`gpt-4o` does not exist"),
    ({"model": "a\n\x1b[2Jb"}, "model", "model_not_found", r"`a ?[2Jb` does not exist"),
    ({"model": 3}, "model", "invalid_type", "must be a string"),
    ({"model": ...}, "model", "missing_required_parameter", "is required"),
    ({"messages": ...}, "messages", "missing_required_parameter", "is required"),
    ({"messages": []}, "messages", "invalid_value", "at least 1 item"),
    ({"messages": "hello"}, "messages", "invalid_type", "must be a list"),
    ({"messages": [3]}, "messages[0]", "invalid_type", "must be an object"),
    ({"messages": [{}]}, "messages[0].role", "missing_required_parameter", "is required"),
    ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "invalid_value", "'system'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter", "is required"),
    (
        {"messages": [{"role": "user", "content": None}]},
        "messages[0].content",
        "invalid_type",
        "string or a list",
    ),
    (
        {"messages": [{"role": "user", "content": 3}]},
        "messages[0].content",
        "invalid_type",
        "string or a list",
    ),
    ({"messages": user_message()}, "messages[0].content", "invalid_value", "at least 1 item"),
    ({"messages": user_message("a")}, "messages[0].content[0]", "invalid_type", "must be an object"),
    (
        {"messages": user_message({"type": "video"})},
        "messages[0].content[0].type",
        "invalid_value",
        "'image_url'",
    ),
    (
        {"messages": user_message({"text": "a"})},
        "messages[0].content[0].type",
        "missing_required_parameter",
        "",
    ),
    (
        {"messages": user_message({"type": "text"})},
        "messages[0].content[0].text",
        "missing_required_parameter",
        "",
    ),
    (
        {"messages": user_message(TEXT_PART, {**TEXT_PART, "x": 1})},
        "messages[0].content[1].x",
        "unknown_parameter",
        "is not a parameter",
    ),
    (
        {"messages": user_message(image_part(3))},
        "messages[0].content[0].image_url.url",
        "invalid_type",
        "must be a string",
    ),
    (
        {"messages": user_message(image_part("data:,x", a=1))},
        "messages[0].content[0].image_url.a",
        "unknown_parameter",
        "",
    ),
    (
        {"messages": user_message(image_part("data:,x"))},
        "messages[0].content[0].image_url.url",
        "invalid_image",
        "Pillow",
    ),
    (
        {"messages": user_message(TEXT_PART, image_part("data:x"))},
        "messages[0].content[1].image_url.url",
        "invalid_image",
        "comma",
    ),
    ({"messages": question("a<img>/etc/passwd</img>")}, "messages[0].content", "invalid_value", "image_url"),
    ({"messages": question("</img>")}, "messages[0].content", "invalid_value", "</img>"),
    ({"messages": question("<imgpad>")}, "messages[0].content", "invalid_value", "<imgpad>"),
    (
        {"messages": user_message({"type": "text", "text": "<im"}, {"type": "text", "text": "g>"})},
        "messages[0].content",
        "invalid_value",
        "<img>",
    ),
    (
        {
            "messages": [
                *question("a"),
                {"role": "assistant", "content": [image_part("data:,x")]},
                *question("b"),
            ]
        },
        "messages[1].content[0].type",
        "invalid_value",
        "only a user message",
    ),
    (
        {"messages": [{"role": "system", "content": [image_part("data:,x")]}, *question("b")]},
        "messages[0].content[0].type",
        "invalid_value",
        "only a user message",
    ),
    (
        {"messages": [*question("a"), {"role": "system", "content": "b"}]},
        "messages[1].role",
        "invalid_value",
        "first",
    ),
    (
        {"messages": [{"role": "assistant", "content": "b"}, *question("a")]},
        "messages[0].role",
        "invalid_value",
        "before",
    ),
    (
        {"messages": [*question("a"), {"role": "assistant", "content": "b"}]},
        "messages",
        "invalid_value",
        "the last",
    ),
    ({"messages": [{"role": "system", "content": "b"}]}, "messages", "invalid_value", "the last"),
    (
        {"messages": [*question("a"), {"role": "assistant", "content": "b", "tool_calls": [1]}]},
        "messages[1].tool_calls",
        "unsupported_parameter",
        "not supported",
    ),
    (
        {"messages": question("a b c d e " * 4000)},
        "messages",
        "context_length_exceeded",
        "maximum context length",
    ),
    ({"messages": question("a" * 2_000_000)}, "messages", "context_length_exceeded", "at least"),
    ({"messages": question("?") * 2000}, "messages", "invalid_value", "at most 1024"),
    ({"temperature": 3}, "temperature", "invalid_value", "less than or equal to 2, got 3"),
    ({"temperature": -0.1}, "temperature", "invalid_value", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "invalid_type", "must be a number"),
    ({"temperature": "1"}, "temperature", "invalid_type", "must be a number"),
    ({"top_p": 1.5}, "top_p", "invalid_value", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "invalid_value", "-1"),
    ({"top_k": 1.5}, "top_k", "invalid_type", "whole number"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
    ({"max_tokens": 3000}, "max_tokens", "invalid_value", "3000 is too large, this server allows 2000"),
    (
        {"max_tokens": ..., "max_completion_tokens": 10**30},
        "max_completion_tokens",
        "invalid_value",
        "too large",
    ),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value", "max_completion_tokens"),
    ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "invalid_value", "4 exceeds the maximum tokens"),
    ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value", "equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value", "equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value", "0.01"),
    ({"seed": 2**64}, "seed", "invalid_value", "less than"),
    ({"seed": True}, "seed", "invalid_type", "whole number"),
    ({"n": 0}, "n", "invalid_value", "equal to 1"),
    ({"n": 9}, "n", "invalid_value", "9 is too large, this server allows 8"),
    ({"stream": "yes"}, "stream", "invalid_type", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value", "stream: true"),
    (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        "unknown_parameter",
        "is not a parameter",
    ),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value", "equal to 20"),
    ({"logprobs": 3}, "logprobs", "invalid_type", "true or false"),
    ({"metadata": 3}, "metadata", "invalid_type", "must be an object"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "not supported"),
    ({"functions": [{}]}, "functions", "unsupported_parameter", "not supported"),
    (
        {"response_format": {"type": "json_object"}},
        "response_format",
        "unsupported_parameter",
        "not supported",
    ),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter", "not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias", "unsupported_parameter", "not supported"),
    ({"store": True}, "store", "unsupported_parameter", "not supported"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter", "not supported"),
    ({"prediction": {"type": "content"}}, "prediction", "unsupported_parameter", "not supported"),
    ({"echo": True}, "echo", "unknown_parameter", "is not a parameter"),
    ({"temprature": 1}, "temprature", "unknown_parameter", "is not a parameter"),
    ({"a\ud800": 1}, "a?", "unknown_parameter", "is not a parameter"),
    ({"x" * 1000: 1}, "x" * 59 + "…", "unknown_parameter", "is not a parameter"),
]

INVALID_COMPLETION_REQUESTS = [
    ({"prompt": ...}, "prompt", "missing_required_parameter", "is required"),
    ({"prompt": ""}, "prompt", "invalid_value", "empty"),
    ({"prompt": []}, "prompt", "invalid_value", "at least 1 item"),
    ({"prompt": [[]]}, "prompt[0]", "invalid_value", "at least 1 item"),
    ({"prompt": {}}, "prompt", "invalid_type", "string or a list"),
    ({"prompt": ["a", 3]}, "prompt[1]", "invalid_type", "string"),
    ({"prompt": ["a", "<img>"]}, "prompt[1]", "invalid_value", "<img>"),
    ({"prompt": "<img>x</img>"}, "prompt", "invalid_value", "image_url"),
    ({"prompt": [1, -1]}, "prompt[1]", "invalid_value", "-1"),
    ({"prompt": [1, 2**40]}, "prompt[1]", "invalid_value", "less than"),
    # In the demo model's vocabulary, 681 is <|extra_2|>, 890 is <img>, 892 is <imgpad>.
    ({"prompt": [1, 681]}, "prompt[1]", "invalid_value", "control tokens"),
    ({"prompt": [[1], [890]]}, "prompt[1][0]", "invalid_value", "control tokens"),
    ({"prompt": [[1], [892]]}, "prompt[1][0]", "invalid_value", "control tokens"),
    ({"prompt": [1, 100_000]}, "prompt[1]", "invalid_value", "control tokens"),
    ({"prompt": [1] * 9000}, "prompt", "context_length_exceeded", "9000 tokens"),
    ({"prompt": ["a"] * 5, "n": 2}, "prompt", "invalid_value", "10 is too large"),
    ({"echo": True}, "echo", "unsupported_parameter", "not supported"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter", "not supported"),
    ({"best_of": 3}, "best_of", "unsupported_parameter", "not supported"),
    ({"logprobs": True}, "logprobs", "invalid_type", "whole number"),
    ({"logprobs": 21}, "logprobs", "invalid_value", "equal to 20"),
    ({"messages": question("?")}, "messages", "unknown_parameter", "is not a parameter"),
]

INVALID_TOKENIZE_REQUESTS = [
    ({}, "prompt", "invalid_value", "give one of them"),
    ({"prompt": "a", "messages": question("a")}, "prompt", "invalid_value", "give one of them"),
    ({"text": "a"}, "text", "unknown_parameter", "is not a parameter"),
    ({"prompt": "a", "model": "x"}, "model", "model_not_found", "does not exist"),
]


def check_error(server, path, valid_body, changes, param, code, message):
    changed = {**valid_body, **changes}
    body = {name: value for name, value in changed.items() if value is not ...}
    # Not `json=body`: some keys contain lone surrogates. json.dumps escapes them, httpx would not.
    response = server.http.post(path, content=json.dumps(body), headers={"content-type": JSON_TYPE})
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    assert response.headers["content-type"] == JSON_TYPE
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert message in error["message"]
    assert len(error["message"]) < 400
    assert not server.admission.slots_in_use


@pytest.mark.parametrize(("changes", "param", "code", "message"), INVALID_CHAT_REQUESTS)
def test_invalid_chat_request(server, changes, param, code, message):
    valid_body = {"model": NAME, "messages": question("?"), "max_tokens": 1}
    check_error(server, "/v1/chat/completions", valid_body, changes, param, code, message)


@pytest.mark.parametrize(("changes", "param", "code", "message"), INVALID_COMPLETION_REQUESTS)
def test_invalid_completion_request(server, changes, param, code, message):
    valid_body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    check_error(server, "/v1/completions", valid_body, changes, param, code, message)


@pytest.mark.parametrize(("changes", "param", "code", "message"), INVALID_TOKENIZE_REQUESTS)
def test_invalid_tokenize_request(server, changes, param, code, message):
    check_error(server, "/tokenize", {}, changes, param, code, message)


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        # JSON that cannot be parsed: incomplete, not UTF-8, nested too deeply, a number with too many digits.
        (b"{", JSON_TYPE, 400, "invalid_json"),
        (b"\xff\xfe", JSON_TYPE, 400, "invalid_json"),
        (b"[" * 100_000, JSON_TYPE, 400, "invalid_json"),
        (b'{"model": ' + b"9" * 5000 + b"}", JSON_TYPE, 400, "invalid_json"),
        # Empty, or not an object.
        (b"", JSON_TYPE, 400, "missing_required_parameter"),
        (b"[]", JSON_TYPE, 400, "invalid_type"),
        (b"3", JSON_TYPE, 400, "invalid_type"),
        (b"null", JSON_TYPE, 400, "invalid_type"),
        # NaN, and a number beyond the range of float64.
        (b'{"messages": NaN}', JSON_TYPE, 400, "missing_required_parameter"),
        (b'{"model": "qwen-vl-chat", "seed": 1e400, "messages": []}', JSON_TYPE, 400, "invalid_type"),
        # A lone surrogate as the model's name.
        (
            b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
            JSON_TYPE,
            404,
            "model_not_found",
        ),
        # Another content type.
        (b'{"model": "qwen-vl-chat"}', "text/plain", 415, "unsupported_media_type"),
        (b'{"model": "qwen-vl-chat"}', "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
    ],
)
def test_invalid_body(server, content, content_type, status, code):
    headers = {"content-type": content_type}
    response = server.http.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"]
    assert error["code"] == code


def test_lone_surrogate_in_a_message_is_valid(server):
    content = b'{"model": "qwen-vl-chat", "messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"content-type": JSON_TYPE}
    assert server.http.post("/v1/chat/completions", content=content, headers=headers).status_code == 200


def test_number_of_validation_errors_is_limited():
    """Pydantic reports one error per invalid value; a body of some megabytes must not cause gigabytes of errors.

    The bodies have thousands of invalid items or unknown parameters, or too many keys of `metadata` (16 are allowed) or
    tokens of a prompt (65,536 are allowed).
    """
    unknown_parameters = dict.fromkeys(map(str, range(10_000)), 1)
    valid_body = {"model": NAME, "messages": question("?")}
    for changes in (
        {"messages": [1] * 10_000},
        unknown_parameters,
        {"stop": [1] * 10_000},
        {"messages": user_message(*[3] * 10_000)},
        {"messages": [{**question("?")[0], **unknown_parameters}]},
        {"messages": user_message({**TEXT_PART, **unknown_parameters})},
        {"messages": [*question("?"), {"role": "assistant", "content": "", "boxes": [1] * 10_000}]},
        {"metadata": unknown_parameters},
    ):
        with pytest.raises(ValidationError) as errors:
            ChatCompletionRequest.model_validate({**valid_body, **changes})
        assert errors.value.error_count() <= 10
    for prompt in (
        ["a", *[3] * 10_000],
        [1, *["a"] * 10_000],
        [[1, *["a"] * 10_000]] * 10,
        [[1] * 70_000],
    ):
        with pytest.raises(ValidationError) as errors:
            CompletionRequest.model_validate({"model": NAME, "prompt": prompt})
        assert errors.value.error_count() <= 10


def test_schema_errors_quote_no_text_values(server):
    for invalid in ({"temperature": "my secret"}, {"messages": "my secret"}, {"stop": ["my secret" * 100]}):
        body = {"model": NAME, "messages": question("?"), **invalid}
        response = server.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400
        assert "secret" not in response.text


def test_openai_client_raises_its_exception_classes(server):
    with pytest.raises(openai.NotFoundError) as not_found:
        server.openai.chat.completions.create(model="gpt-4o", messages=question("?"))
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad_request:
        chat(server, question("?"), temperature=9, stream=True)
    assert (bad_request.value.param, bad_request.value.type) == ("temperature", "invalid_request_error")
    server.admission.refuse_with = ApiError(
        429, "The queue is full.", "rate_limit_error", code="queue_full", headers={"Retry-After": "3"}
    )
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as rate_limit:
            chat(server, question("?"), stream=stream)
        assert rate_limit.value.response.headers["retry-after"] == "3"


def test_limits_come_from_the_settings(server, change_settings):
    content, _ = demo_question("pair")  # two images
    messages = [{"role": "user", "content": content}]
    change_settings(max_images=1, max_prompt_tokens=300, max_new_tokens=4, max_choices=1)
    with pytest.raises(
        openai.BadRequestError, match="number of images: 2 is too large, this server allows 1"
    ):
        chat(server, messages)
    with pytest.raises(openai.BadRequestError, match="300 tokens"):
        chat(server, question("a b c " * 200))
    with pytest.raises(openai.BadRequestError, match="5 is too large, this server allows 4"):
        chat(server, question("?"), max_tokens=5)
    with pytest.raises(openai.BadRequestError, match="2 is too large, this server allows 1"):
        chat(server, question("?"), n=2)
    assert chat(server, question("Hello")).usage.completion_tokens <= 4
    assert not server.images.loaded


def test_base_model_refuses_chat_requests(server):
    server.service.is_chat = False
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        chat(server, question("?"))
    assert server.http.post("/tokenize", json={"messages": question("?")}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/x", 404, "model_not_found"),
    ],
)
def test_unknown_path_method_or_model(server, method, path, status, code):
    response = server.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"]
