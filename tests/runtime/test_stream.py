"""Answers streamed in segments, and conversations that reuse the KV cache and image features of earlier turns."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES, open_model
from executors import record
from hypothesis import given, settings
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.export.export import export_language, export_vision
from paddlemix_qwenvl_plugin.processing import prompts
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.runtime.engine_executor import EngineExecutor
from paddlemix_qwenvl_plugin.runtime.image_cache import ImageCache
from paddlemix_qwenvl_plugin.runtime.loop import Loop
from paddlemix_qwenvl_plugin.runtime.segments import Segment, SegmentBuilder
from paddlemix_qwenvl_plugin.tiny import make as tiny
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary

STREET = Path(__file__).parents[2] / "recipes" / "images" / "street.png"
OTHER = Path(__file__).parents[1] / "golden" / "text" / "wide.png"
IMAGE_QUERY = [{"image": str(STREET)}, {"text": "What is this?"}]
OTHER_IMAGE_QUERY = [{"image": str(OTHER)}, {"text": "And this?"}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random model whose rotary base changes after 512 tokens. With most seeds other than 6 it repeats one token."""
    folder = tmp_path_factory.mktemp("stream")
    tiny_config = tiny.tiny_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tiny_config", lambda *args: {**tiny_config(*args), "seq_length": 512})
        tiny.make_tiny(folder / "model", seed=6)
    export_vision(folder / "model", folder / "vision" / "vision")
    export_language(folder / "model", folder / "text", "qwen")
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def vl(exported, request):
    return open_model(exported / "vision" / "vision", exported / "text" / "qwen", request.param)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "qwen.tiktoken"
    write_tiny_vocabulary(path)
    return QwenTokenizer(path)


@pytest.fixture
def recording(vl, monkeypatch):
    """The calls of the executor from now on; its loop begins without cached content."""
    return record(vl, monkeypatch)


def test_segments_are_the_answer(vl):
    answer = vl.generate(IMAGE_QUERY, max_new_tokens=40)
    stream = vl.stream(IMAGE_QUERY, max_new_tokens=40)
    segments = list(stream)
    assert len(segments) > 5
    assert "".join(segment.text for segment in segments) == answer.text
    assert stream.answer.token_ids == answer.token_ids
    assert stream.answer.finish_reason == answer.finish_reason == "length"
    assert set(stream.answer.timings) == set(answer.timings)


def test_sampling_parameters_of_a_stream(vl):
    options = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.9, "seed": 4}
    assert vl.stream("Hi", **options).finish().token_ids == vl.generate("Hi", **options).token_ids


TAGS = "<ref> </ref> <box> </box> <quad> </quad> (1,2),(30,40) (5,6) (1,2),(3,4),(5,6),(7,8)"
WORDS = ["a dog", "图中", "狗", "é", "<", "<re", ">", " ", "\n"]
COMPLETE = [
    "<ref>a dog</ref>",
    "<ref> </ref>",
    "<box>(1,2),(30,40)</box>",
    "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
]
text = st.lists(st.sampled_from([*TAGS.split(), *WORDS, *COMPLETE * 4]), max_size=12).map("".join)


@settings(deadline=None, max_examples=400)
@given(text=st.one_of(text, st.text(max_size=20)))
def test_segments_of_any_text(tokenizer, text):
    """However tokens split an answer, its segments have the same text and boxes as the complete answer."""
    for tags in (tokenizer.special_tokens, ()):  # tags as special tokens, and as ordinary text
        # Without <img>, which as a special token would need a path and an </img>.
        ids = tokenizer.encode(text.replace("<img>", ""), allowed_special=tags)
        builder = SegmentBuilder(tokenizer)
        segments = [segment for token in ids for segment in builder.add(token)] + list(builder.finish())
        complete = tokenizer.decode(ids)
        assert "".join(segment.text for segment in segments) == complete
        assert [box for segment in segments for box in segment.boxes] == parse_boxes(complete).boxes
        assert all(segment.text for segment in segments)


@settings(deadline=None)
@given(data=st.binary(max_size=12))
def test_any_bytes(tokenizer, data):
    builder = SegmentBuilder(tokenizer)
    segments = [segment for byte in data for segment in builder.add(byte)] + list(builder.finish())
    assert "".join(segment.text for segment in segments) == data.decode("utf-8", "replace")


def test_a_character_of_several_tokens_is_one_segment(tokenizer):
    builder = SegmentBuilder(tokenizer)
    assert [list(builder.add(byte)) for byte in b"ab"] == [[Segment("a")], [Segment("b")]]
    assert [list(builder.add(byte)) for byte in "狗".encode()] == [[], [], [Segment("狗")]]


def test_a_ref_or_box_is_one_segment(tokenizer):
    builder = SegmentBuilder(tokenizer)
    ids = tokenizer.encode("Here: <ref>the dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>.")
    segments = [segment for token in ids for segment in builder.add(token)]
    tagged = [segment for segment in segments if segment.ref or segment.boxes]
    assert [segment.ref for segment in tagged] == ["the dog", None, None]
    assert [box.ref for segment in tagged for box in segment.boxes] == ["the dog", "the dog"]
    assert [box.points for segment in tagged for box in segment.boxes] == [((1, 2), (3, 4)), ((5, 6), (7, 8))]
    assert segments[-1] == Segment(".")


def test_closing_a_stream_stops_the_computation(vl, recording):
    with vl.stream(IMAGE_QUERY, max_new_tokens=40) as stream:
        list(itertools.islice(stream, 2))
    n_steps = len(recording.steps)
    assert n_steps < 20
    assert list(stream) == []
    assert len(recording.steps) == n_steps
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.token_ids == vl.generate(IMAGE_QUERY, max_new_tokens=40).token_ids[:n_steps]


def test_invalid_requests_fail_before_the_first_segment(vl):
    with pytest.raises(UsageError, match="top_p"):
        vl.stream("Hi", top_p=2)
    with pytest.raises(UsageError, match=r"nothing\.png"):
        vl.stream([{"image": "nothing.png"}])


def test_an_image_is_encoded_once(vl, recording):
    vl.generate(IMAGE_QUERY, max_new_tokens=1)
    vl.generate([*IMAGE_QUERY, {"text": " Again?"}], max_new_tokens=1)
    assert recording.done.count("encode") == 1
    vl.generate(OTHER_IMAGE_QUERY, max_new_tokens=1)
    assert recording.done.count("encode") == 2


def test_image_cache_forgets_the_least_recently_used():
    features = np.zeros([4, 4], np.float32)
    cache = ImageCache(max_bytes=2 * features.nbytes)
    encoded = []
    for image in (0, 1, 0, 2, 0, 1):
        if cache.get(b"%d" % image) is None:
            encoded.append(image)
            cache.put(b"%d" % image, features)
    assert encoded == [0, 1, 2, 1]


def from_history(vl, history, query, n_tokens):
    """The completion of a turn, computed from its history by `generate`."""
    return vl.generate(query, chat=True, history=list(history), max_new_tokens=n_tokens).token_ids


def test_chat_computes_only_new_tokens(vl, recording):
    """A turn encodes no image of an earlier turn again.

    On the engine, it computes only the tokens after the full blocks that its prompt has in common with the prompt and
    the answer of the previous turn.
    """
    chat = vl.chat()
    first = chat.ask(IMAGE_QUERY, max_new_tokens=4).finish()
    n_first = recording.steps[0]
    del recording.done[:]
    second = chat.ask("Sure?", max_new_tokens=6).finish()
    assert "encode" not in recording.done
    first_prompt, second_prompt = prompts_of_turns(vl, [(IMAGE_QUERY, first.text.strip())], "Sure?")
    computed = first_prompt + [(token, True) for token in first.token_ids[:-1]]
    n_common = next(n for n, (old, new) in enumerate(zip([*computed, None], second_prompt)) if old != new)
    assert n_common >= n_first
    n_cached = n_common // 32 * 32 if isinstance(recording._executor, EngineExecutor) else 0
    assert recording.steps[0] == len(second_prompt) - n_cached
    assert second.image_size == first.image_size == (960, 640)
    assert [answer for _, answer in chat.history] == [first.text.strip(), second.text.strip()]
    vl._loop = Loop(recording._executor)  # without cached content
    assert second.token_ids == from_history(vl, [(IMAGE_QUERY, first.text.strip())], "Sure?", 6)


def prompts_of_turns(vl, history, query):
    """The prompts of the last turn of `history` and of the turn after it: lists of (token, whether generated)."""
    for n_earlier, turn_query in ((len(history) - 1, history[-1][0]), (len(history), [{"text": query}])):
        prompt = prompts.chat_prompt(vl.tokenizer, turn_query, history[:n_earlier])
        generated = {position for span in prompt.generated for position in range(*span)}
        yield [(token, position in generated) for position, token in enumerate(prompt.input_ids)]


def test_chat_equals_the_same_turns_without_a_cache(vl):
    """Six turns, beyond the change of the rotary base, with new and repeated images, and an answer closed early."""
    chat = vl.chat("Be brief.")
    queries = [IMAGE_QUERY, "Sure?", OTHER_IMAGE_QUERY, "Which is larger?", IMAGE_QUERY, "Why?"]
    for turn, query in enumerate(queries):
        expected = vl.generate(
            query if isinstance(query, list) else [{"text": query}],
            chat=True,
            history=list(chat.history),
            system="Be brief.",
            max_new_tokens=8,
        ).token_ids
        stream = chat.ask(query, max_new_tokens=8)
        if turn == 3:
            list(itertools.islice(stream, 2))
            stream.close()
            n_tokens = len(stream.answer.token_ids)
            assert 0 < n_tokens < 8
            assert stream.answer.token_ids == expected[:n_tokens]
        else:
            assert stream.finish().token_ids == expected
    assert len(chat.history) == 6


def test_chat_drops_its_oldest_turns(vl, monkeypatch):
    """The prompt then begins with another image, whose path begins like that of the dropped one.

    Blocks that are cached for the dropped image do not change the completion.
    """
    short_window = functools.partial(prompts.chat_prompt, max_window=600)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.chat.chat_prompt", short_window)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.predictor.chat_prompt", short_window)
    chat = vl.chat()
    for query in (IMAGE_QUERY, OTHER_IMAGE_QUERY, IMAGE_QUERY, "Why?", OTHER_IMAGE_QUERY):
        expected = from_history(vl, chat.history, query if isinstance(query, list) else [{"text": query}], 6)
        assert chat.ask(query, max_new_tokens=6).finish().token_ids == expected


def test_clear_removes_the_history(vl, recording):
    chat = vl.chat()
    chat.ask(IMAGE_QUERY, max_new_tokens=2).finish()
    chat.clear()
    assert chat.history == ()
    answer = chat.ask("Hello", max_new_tokens=2).finish()
    assert answer.image_size is None
    assert answer.token_ids == vl.generate("Hello", chat=True, max_new_tokens=2).token_ids


def test_a_failed_turn_is_not_recorded(vl):
    chat = vl.chat()
    with pytest.raises(UsageError):
        chat.ask([{"image": "nothing.png"}])
    assert chat.history == ()


def test_stop_ends_after_the_current_step(vl, recording):
    """Even while no segment is complete; an incomplete segment is delivered, so the answer's text is complete."""
    chat = vl.chat()
    stream = chat.ask(IMAGE_QUERY, max_new_tokens=40)
    texts = [next(stream).text]
    recording.before_step = stream.stop
    n_steps = len(recording.steps)
    texts += [segment.text for segment in stream]
    assert len(recording.steps) == n_steps + 1
    assert "".join(texts) == stream.answer.text
    assert stream.answer.finish_reason == "cancelled"
    assert [answer for _, answer in chat.history] == [stream.answer.text.strip()]


def test_a_stream_stopped_before_its_first_token_is_not_recorded(vl, recording):
    chat = vl.chat()
    stream = chat.ask("Hello", max_new_tokens=4)
    stream.stop()
    assert list(stream) == []
    assert recording.done == []
    assert chat.history == ()


def test_a_turn_that_fails_in_the_middle_is_not_recorded(vl, recording):
    chat = vl.chat()
    first = chat.ask(IMAGE_QUERY, max_new_tokens=4).finish()
    stream = chat.ask("Sure?", max_new_tokens=8)
    next(stream)

    def fail():
        raise QwenVLError("out of memory")

    recording.before_step = fail
    with pytest.raises(QwenVLError, match="out of memory"):
        list(stream)
    recording.before_step = lambda: None
    assert [answer for _, answer in chat.history] == [first.text.strip()]
    expected = from_history(vl, chat.history, "Sure?", 8)
    assert chat.ask("Sure?", max_new_tokens=8).finish().token_ids == expected
