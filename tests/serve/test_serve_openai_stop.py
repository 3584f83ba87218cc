"""Stop strings, against cutting the whole text."""

from __future__ import annotations

import itertools

import pytest
from executors import say
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_openai_helpers import NAME, chat, question, streamed, text_of, wait_for

from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.serve.engine_api import Token
from paddlemix_qwenvl_plugin.serve.openai.completion_text import CompletionText
from paddlemix_qwenvl_plugin.serve.openai.stop_strings import StopStrings

pytest_plugins = ("serve_openai_fixtures",)

TOKENIZER = QwenTokenizer(MODEL / "qwen.tiktoken")

strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
words = st.sampled_from(
    ["a", "b", "ab", "狗", "<ref>a</ref>", "<box>(1,2),(3,4)</box>", "<ref>", "</box>", "<"]
)
spoken = st.lists(words, max_size=12).map("".join)
stops = st.lists(
    st.sampled_from(["a", "ba", "狗", "f>a", "</box>", "(1,2),(", "><", "<box>", "zz"]), max_size=4
)


def cut(text, stop_strings):
    """Reference implementation, character by character: the text before the first complete stop string, or None."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def in_bits(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:])]


@settings(deadline=None, max_examples=500)
@given(text=st.text("ab", max_size=16), stop_strings=strings, cuts=st.lists(st.integers(0, 16), max_size=5))
def test_any_bits(text, stop_strings, cuts):
    found = StopStrings(stop_strings)
    ready = "".join(found.add(bit) for bit in in_bits(text, cuts))
    expected = cut(text, stop_strings)
    assert found.found == (expected is not None)
    assert (ready if found.found else ready + found.finish()) == (text if expected is None else expected)


@settings(deadline=None)
@given(bits=st.lists(st.text("ab", max_size=3), max_size=8), stop_strings=strings)
def test_nothing_is_held_back_without_need(bits, stop_strings):
    found = StopStrings(stop_strings)
    for n in range(1, len(bits) + 1):
        found.add(bits[n - 1])
        text = "".join(bits[:n])
        if found.found:
            return
        given_so_far = len(text) - len(found._held)
        partial = [k for k in range(len(text)) if any(stop.startswith(text[k:]) for stop in stop_strings)]
        assert given_so_far == min([*partial, len(text)])


@settings(deadline=None, max_examples=300)
@given(text=spoken, stop_strings=stops, by_bytes=st.booleans(), size=st.integers(1, 4))
def test_any_tokens(text, stop_strings, by_bytes, size):
    """Text, boxes and tokens of a completion, for any split into tokens and lists."""
    ids = list(text.encode()) if by_bytes else TOKENIZER.encode(text)
    lists = [[Token(token) for token in ids[i : i + size]] for i in range(0, len(ids), size)]
    completion = CompletionText(TOKENIZER, [TOKENIZER.im_end_id], stop_strings, with_tokens=True)
    deltas = []
    for tokens in lists:
        deltas.append(completion.add(tokens))
        if completion.stopped:
            break
    deltas.append(completion.finish())
    expected = cut(text, stop_strings)
    assert completion.stopped == (expected is not None)
    handed = "".join(delta.text for delta in deltas)
    assert handed == (text if expected is None else expected)
    assert [box for delta in deltas for box in delta.boxes] == parse_boxes(handed).boxes
    tokens = [placed.token.id for delta in deltas for placed in delta.tokens]
    bytes_of_tokens = b"".join(map(TOKENIZER.token_bytes, tokens))
    if expected is None:
        assert tokens == ids
    else:  # the last token may go beyond
        assert bytes_of_tokens.startswith(handed.encode())
        last = len(TOKENIZER.token_bytes(tokens[-1])) if tokens else 0
        assert len(bytes_of_tokens) - last < len(handed.encode()) or not handed


def test_answers_are_cut(server, local_model):
    """Streamed and whole, with strings of one to four characters of the answer itself."""
    text = local_model.generate("Hello", chat=True, max_new_tokens=40).text
    assert len(text) > 20
    for start, length in itertools.product(range(2, len(text) - 4, 7), (1, 4)):
        stop = text[start : start + length]
        (choice,) = chat(server, question("Hello"), max_tokens=40, stop=stop).choices
        assert choice.message.content == cut(text, [stop])
        assert choice.finish_reason == "stop"
        chunks = streamed(server, question("Hello"), max_tokens=40, stop=[stop, "never there"])
        assert text_of(chunks) == cut(text, [stop])
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_ends_the_request(server, monkeypatch):
    """At the step in which it is complete; its tokens are counted, and none after them."""
    tokenizer = server.service.tokenizer
    tokens = tokenizer.encode("well stop " + "and on " * 200)
    n = len(tokenizer.encode("well stop"))
    say(server.engine.vl, monkeypatch, tokens)
    server.engine.step_seconds = 0.01
    completion = chat(server, question("?"), stop="stop", max_tokens=len(tokens), logprobs=True)
    assert completion.choices[0].message.content == "well "
    assert n - 4 < completion.usage.completion_tokens <= n
    (stream,) = server.engine.submitted
    wait_for(lambda: stream.generation.finished)
    assert stream.generation.finish_reason == "cancelled"
    assert len(stream.generation.tokens) < n + 20
    assert "".join(e.token for e in completion.choices[0].logprobs.content).startswith("well ")


def test_the_end_of_a_tag_as_stop_string(server, monkeypatch):
    """A box cut by a stop string is not parsed."""
    tokenizer = server.service.tokenizer
    text = "<ref>dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
    say(server.engine.vl, monkeypatch, [*tokenizer.encode(text), tokenizer.im_end_id])
    message = chat(server, question("?"), stop=["</box><", "(7"]).choices[0].message
    assert message.content == "<ref>dog</ref><box>(1,2),(3,4)"
    assert message.boxes == []


@pytest.mark.parametrize("stop", ["", ["a"] * 5, [""], 3, ["a", 3], "a" * 257, [["a"]]])
def test_wrong_stop_strings(server, stop):
    body = {"model": NAME, "messages": question("?"), "stop": stop}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("stop")
