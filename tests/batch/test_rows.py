"""Rows of a batch file, plain ({"id": .., "prompt": ..}) and in OpenAI's format: parsing, errors, output lines."""

from __future__ import annotations

import json

import pytest
from batch_helpers import openai_row, text, user

from paddlemix_qwenvl_plugin import GenerationOptions, UsageError
from paddlemix_qwenvl_plugin.batch.request import Reply, RowRequest
from paddlemix_qwenvl_plugin.batch.rows import error_line, id_key, read_row, reply_line, result_id
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.request import Request
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

ANSWER = Answer(
    text="<ref>狗</ref><box>(0,0),(500,1000)</box>",
    boxes=(Box("box", ((0, 0), (500, 1000)), "狗"),),
    image_size=(200, 100),
    problems=(),
    token_ids=[1, 2],
    finish_reason="stop",
    timings={},
)


def read(row, **defaults):
    """Parse a row as line 7; a row of type bytes is the line itself."""
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return read_row(7, line, defaults)


def test_plain_row():
    row = read({"id": 3, "image": "a.png", "prompt": "What?", "temperature": 0.5}, seed=1)
    assert (row.id, row.openai) == (3, False)
    options = GenerationOptions(temperature=0.5, seed=1)
    assert row.parsed == RowRequest(Request([{"image": "a.png"}, {"text": "What?"}], options))


def test_plain_row_with_images_and_system_prompt():
    row = read({"id": "a", "images": ["a.png", "b.png"], "chat": True, "system": "Be brief.", "prompt": None})
    parts = [{"image": "a.png"}, {"image": "b.png"}]
    assert row.parsed == RowRequest(Request(parts, GenerationOptions(), chat=True, system="Be brief."))


def test_openai_row():
    messages = [
        {"role": "system", "content": "Be brief."},
        user("data:a", text("What?")),
        {"role": "assistant", "content": [text("A "), text("dog.")]},
        user("Sure?"),
    ]
    row = read(
        openai_row("x", messages, max_tokens=5, temperature=None, seed=2, n=1, stream=False),
        seed=1,
        top_p=0.5,
    )
    assert (row.id, row.openai) == ("x", True)
    request = Request(
        [{"text": "Sure?"}],
        GenerationOptions(max_new_tokens=5, seed=2, top_p=0.5),
        chat=True,
        history=[([{"image": "data:a"}, {"text": "What?"}], "A dog.")],
        system="Be brief.",
    )
    assert row.parsed == RowRequest(request, "m")


def test_generation_options_of_openai_rows():
    options = {"temperature": 0.1, "top_p": 0.2, "frequency_penalty": 0.3, "presence_penalty": 0.4, "seed": 5}
    row = read(
        openai_row("x", [user("?")], max_completion_tokens=6, user="me", metadata={"a": "b"}, **options)
    )
    assert row.parsed.request.options == GenerationOptions(max_new_tokens=6, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{oops", "line 7: not valid JSON"),
        (b"\xff", "line 7: not valid JSON"),
        (b'{"id": NaN}', "line 7: not valid JSON (NaN is not a JSON number)"),
        (b"[" * 100_000, "line 7: not valid JSON"),
        (b"[1]", "line 7: must be a JSON object"),
        ({"prompt": "?"}, "line 7: id must be a string or a whole number"),
        ({"id": None, "prompt": "?"}, "line 7: id must be a string or a whole number"),
        ({"id": True, "prompt": "?"}, "line 7: id must be a string or a whole number"),
        ({"custom_id": 1, "body": {}}, "line 7: custom_id must be a string"),
        ({"body": {}}, "line 7: custom_id must be a string"),
    ],
)
def test_rows_without_an_id(row, message):
    parsed_row = read(row)
    assert parsed_row.id is None
    assert isinstance(parsed_row.parsed, UsageError)
    assert str(parsed_row.parsed).startswith(message)


def test_format_of_a_damaged_line():
    assert read(b'{"custom_id": "a", "bod').openai
    assert read(b'{"body": oops}').openai
    assert not read(b'{"id": "a", "promp').openai


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "nothing to ask"),
        ({"prompt": 1}, "prompt must be a string"),
        ({"prompt": "?", "promt": "?"}, "promt: unknown key; known keys: adapter, chat, "),
        ({"image": ["a.png"]}, "image must be a string"),
        ({"images": "a.png"}, "images must be a list"),
        ({"images": [1]}, "an item of images must be a string"),
        ({"image": "a", "images": ["b"]}, "image and images: give one of them"),
        ({"prompt": "?", "chat": "yes"}, "chat must be true or false"),
        ({"prompt": "?", "system": "Hi"}, "system: only a chat"),
        ({"prompt": "?", "temperature": "hot"}, "temperature: 'hot' is not a number"),
        ({"prompt": "?", "max_new_tokens": 0}, "max_new_tokens: 0 is out of range"),
    ],
)
def test_invalid_plain_rows(row, message):
    parsed_row = read({"id": "a", **row})
    assert parsed_row.id == "a"
    assert isinstance(parsed_row.parsed, UsageError)
    assert str(parsed_row.parsed).startswith(message)


def openai_row_a(*messages, **body):
    """Build a row in OpenAI's format with the id "a"."""
    return openai_row("a", list(messages), **body)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"custom_id": "a"}, "body must be an object"),
        ({**openai_row_a(user("?")), "priority": 1}, "priority: unknown key"),
        ({**openai_row_a(user("?")), "method": "GET"}, "method: must be POST"),
        ({**openai_row_a(user("?")), "url": "/v1/embeddings"}, "url: must be /v1/chat/completions"),
        (openai_row_a(user("?"), tools=[]), "body.tools: unknown key"),
        (openai_row_a(user("?"), n=2), "body.n: can only be 1"),
        (openai_row_a(user("?"), stream=True), "body.stream: can only be false"),
        (openai_row_a(user("?"), max_tokens=1, max_completion_tokens=2), "body.max_tokens: another value"),
        (openai_row_a(user("?"), max_tokens="many"), "max_new_tokens: 'many' is not a whole number"),
        (openai_row_a(user("?"), top_p=2), "top_p: 2 is out of range"),
        (openai_row_a(user("?"), model=1), "body.model must be a string"),
        (openai_row("a", "?"), "body.messages must be a list"),
        (openai_row_a(), "body.messages: must end with a user message"),
        (openai_row_a("?"), "body.messages[0] must be an object"),
        (
            openai_row_a({"role": "tool", "content": "?"}),
            "body.messages[0].role: must be user here, got 'tool'",
        ),
        (openai_row_a(user("?"), user("?")), "body.messages[1].role: must be assistant here, got 'user'"),
        (
            openai_row_a(user("?"), {"role": "system", "content": "?"}),
            "body.messages[1].role: must be assistant here",
        ),
        (openai_row_a(user("?"), {"role": "assistant", "content": "?"}), "body.messages: must end with"),
        (openai_row_a({"role": "user", "content": []}), "body.messages[0].content: must be"),
        (
            openai_row_a({"role": "user", "content": "?", "tool_calls": []}),
            "body.messages[0].tool_calls: unknown key",
        ),
        (
            openai_row_a(user({"type": "audio"})),
            "body.messages[0].content[0].type: must be text or image_url",
        ),
        (openai_row_a(user({"type": "text"})), "body.messages[0].content[0].text must be a string"),
        (
            openai_row_a(user(text("?"), {"type": "image_url", "image_url": "a"})),
            "body.messages[0].content[1].image_url must",
        ),
        (
            openai_row_a(user({"type": "image_url", "image_url": {}})),
            "body.messages[0].content[0].image_url.url must",
        ),
        (
            openai_row_a({"role": "system", "content": user("a", "b")["content"]}, user("?")),
            "body.messages[0]: only",
        ),
    ],
)
def test_invalid_openai_rows(row, message):
    parsed_row = read(row)
    assert (parsed_row.id, parsed_row.openai) == ("a", True)
    assert isinstance(parsed_row.parsed, UsageError)
    assert str(parsed_row.parsed).startswith(message)


def test_plain_output():
    line = reply_line(3, openai=False, reply=Reply(ANSWER, 300, len(ANSWER.token_ids), "m"), tag="tag")
    assert "狗".encode() in line
    assert json.loads(line) == {
        "id": 3,
        "text": ANSWER.text,
        "boxes": [
            {
                "kind": "box",
                "ref": "狗",
                "points": [[0, 0], [500, 1000]],
                "pixels": [[0.0, 0.0], [100.0, 100.0]],
            }
        ],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 300, "completion_tokens": 2, "total_tokens": 302},
    }
    assert json.loads(error_line(None, openai=False, error=QwenVLError("no\nway"), tag="tag")) == {
        "id": None,
        "error": "no way",
    }


def test_openai_output():
    row = json.loads(
        reply_line("a", openai=True, reply=Reply(ANSWER, 300, len(ANSWER.token_ids), "m"), tag="tag")
    )
    body = row["response"].pop("body")
    assert row == {
        "id": "batch_req_tag",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req_tag"},
        "error": None,
    }
    assert isinstance(body.pop("created"), int)
    message = {"role": "assistant", "content": ANSWER.text}
    assert body == {
        "id": "chatcmpl-tag",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 300, "completion_tokens": 2, "total_tokens": 302},
    }
    for error, code in ((UsageError("no"), "invalid_request"), (QwenVLError("no"), "failed")):
        assert json.loads(error_line("a", openai=True, error=error, tag="tag")) == {
            "id": "batch_req_tag",
            "custom_id": "a",
            "response": None,
            "error": {"code": code, "message": "no"},
        }


@pytest.mark.parametrize("row_id", ["a", "", "1", 1, "\ud800", "\u2028\n", "狗", None])
def test_parsing_of_output_lines(row_id):
    """A complete output line is parsed into its row's id and whether the row failed; a truncated line is rejected."""
    for openai in (False, True):
        for failed, line in (
            (False, reply_line(row_id, openai, Reply(ANSWER, 1, len(ANSWER.token_ids), "m"), "tag")),
            (True, error_line(row_id, openai, QwenVLError("no"), "tag")),
        ):
            assert line.count(b"\n") == 1
            assert result_id(line) == (id_key(row_id), failed)
            assert all(result_id(line[:size]) is None for size in range(len(line)))
    assert id_key(1) != id_key("1")


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[]\n", b'{"id": 1, "prompt": "?"}\n', b"\0" * 9 + b"\n"])
def test_lines_that_are_not_output_lines(line):
    assert result_id(line) is None
