"""Stop strings in streamed text, compared with a search in the complete text."""

from __future__ import annotations

import itertools

import pytest
from executors import script_completion
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_openai_helpers import NAME, chat, chat_chunks, question, text_of, wait_for

from paddlemix_qwenvl_plugin.demo.run import MODEL
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.serve.engine_api import Token
from paddlemix_qwenvl_plugin.serve.openai.completion_text import CompletionText
from paddlemix_qwenvl_plugin.serve.openai.stop_strings import StopStrings

pytest_plugins = ("serve_openai_fixtures",)

TOKENIZER = QwenTokenizer(MODEL / "qwen.tiktoken")

# With an alphabet of two letters, stop strings often occur in the text and overlap.
ab_stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
words = st.sampled_from(
    ["a", "b", "ab", "狗", "<ref>a</ref>", "<box>(1,2),(3,4)</box>", "<ref>", "</box>", "<"]
)
texts = st.lists(words, max_size=12).map("".join)
text_stop_strings = st.lists(
    st.sampled_from(["a", "ba", "狗", "f>a", "</box>", "(1,2),(", "><", "<box>", "zz"]), max_size=4
)


def text_before_stop(text, stop_strings):
    """Reference implementation: the text before the stop string that is complete first, or None without one.

    Of several that are complete at the same character, the longest one counts.
    """
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


def split_at(text, positions):
    edges = [0, *sorted(min(position, len(text)) for position in positions), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:])]


@settings(deadline=None, max_examples=500)
@given(
    text=st.text("ab", max_size=16),
    stop_strings=ab_stop_strings,
    positions=st.lists(st.integers(0, 16), max_size=5),
)
def test_result_is_independent_of_the_deltas(text, stop_strings, positions):
    search = StopStrings(stop_strings)
    output = "".join(search.add(delta) for delta in split_at(text, positions))
    if not search.found:
        output += search.finish()
    expected = text_before_stop(text, stop_strings)
    assert search.found == (expected is not None)
    assert output == (text if expected is None else expected)


@settings(deadline=None)
@given(deltas=st.lists(st.text("ab", max_size=3), max_size=8), stop_strings=ab_stop_strings)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(deltas, stop_strings):
    search = StopStrings(stop_strings)
    text = ""
    for delta in deltas:
        search.add(delta)
        text += delta
        if search.found:
            return
        n_sent = len(text) - len(search._held)
        # Positions from which the text up to its end is the beginning of a stop string.
        partial = [i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in stop_strings)]
        assert n_sent == min([*partial, len(text)])


@settings(deadline=None, max_examples=300)
@given(text=texts, stop_strings=text_stop_strings, byte_tokens=st.booleans(), size=st.integers(1, 4))
def test_result_is_independent_of_the_tokens(text, stop_strings, byte_tokens, size):
    """Text, boxes and tokens of a completion, with a token per byte or the usual tokens, in lists of 1 to 4 tokens."""
    ids = list(text.encode()) if byte_tokens else TOKENIZER.encode(text)
    lists = [[Token(id_) for id_ in ids[i : i + size]] for i in range(0, len(ids), size)]
    completion = CompletionText(TOKENIZER, [TOKENIZER.im_end_id], stop_strings, with_tokens=True)
    deltas = []
    for tokens in lists:
        deltas.append(completion.add(tokens))
        if completion.stopped:
            break
    deltas.append(completion.finish())
    expected = text_before_stop(text, stop_strings)
    assert completion.stopped == (expected is not None)
    output = "".join(delta.text for delta in deltas)
    assert output == (text if expected is None else expected)
    assert [box for delta in deltas for box in delta.boxes] == parse_boxes(output).boxes
    output_ids = [placed.token.id for delta in deltas for placed in delta.tokens]
    output_bytes = b"".join(map(TOKENIZER.token_bytes, output_ids))
    if expected is None:
        assert output_ids == ids
    else:
        # Only the last token may extend beyond the output: it can contain a part of the stop string.
        assert output_bytes.startswith(output.encode())
        n_last = len(TOKENIZER.token_bytes(output_ids[-1])) if output_ids else 0
        assert len(output_bytes) - n_last < len(output.encode()) or not output


def test_answer_ends_before_a_stop_string(server, local_model):
    """Streamed or not, with stop strings of one and of four characters from the answer."""
    text = local_model.generate("Hello", chat=True, max_new_tokens=40).text
    assert len(text) > 20
    for start, length in itertools.product(range(2, len(text) - 4, 7), (1, 4)):
        stop = text[start : start + length]
        (choice,) = chat(server, question("Hello"), max_tokens=40, stop=stop).choices
        expected = text_before_stop(text, [stop])
        assert choice.message.content == expected
        assert choice.finish_reason == "stop"
        chunks = chat_chunks(server, question("Hello"), max_tokens=40, stop=[stop, "never there"])
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_stop_string_cancels_the_completion(server, monkeypatch):
    """The usage counts the tokens up to the end of the stop string; the generation ends a few steps later."""
    tokenizer = server.service.tokenizer
    tokens = tokenizer.encode("well stop " + "and on " * 200)
    n_until_stop = len(tokenizer.encode("well stop"))
    assert tokenizer.decode(tokens[:n_until_stop]) == "well stop"
    script_completion(server.engine.vl, monkeypatch, tokens)
    server.engine.step_seconds = 0.01
    completion = chat(server, question("?"), stop="stop", max_tokens=len(tokens), logprobs=True)
    assert completion.choices[0].message.content == "well "
    assert completion.usage.completion_tokens == n_until_stop
    (stream,) = server.engine.submitted
    wait_for(lambda: stream.generation.finished)
    assert stream.generation.finish_reason == "cancelled"
    assert len(stream.generation.tokens) < n_until_stop + 20
    assert "".join(entry.token for entry in completion.choices[0].logprobs.content).startswith("well ")


def test_box_cut_by_a_stop_string_is_not_parsed(server, monkeypatch):
    tokenizer = server.service.tokenizer
    text = "<ref>dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
    script_completion(server.engine.vl, monkeypatch, [*tokenizer.encode(text), tokenizer.im_end_id])
    message = chat(server, question("?"), stop=["</box><", "(7"]).choices[0].message
    assert message.content == "<ref>dog</ref><box>(1,2),(3,4)"
    assert message.boxes == []


@pytest.mark.parametrize("stop", ["", ["a"] * 5, [""], 3, ["a", 3], "a" * 257, [["a"]]])
def test_invalid_stop_strings(server, stop):
    body = {"model": NAME, "messages": question("?"), "stop": stop}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("stop")
