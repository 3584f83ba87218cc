"""Answers in segments, and conversations that reuse the computation of earlier turns."""

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
    """A random model whose rotary base grows past 512 tokens; with most seeds it would repeat one token."""
    folder = tmp_path_factory.mktemp("stream")
    small = tiny.tiny_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "tiny_config", lambda *args: {**small(*args), "seq_length": 512})
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
def work(vl, monkeypatch):
    """Records the work of the executor from now on."""
    return record(vl, monkeypatch)


def test_segments_are_the_answer(vl):
    whole = vl.generate(IMAGE_QUERY, max_new_tokens=40)
    stream = vl.stream(IMAGE_QUERY, max_new_tokens=40)
    segments = list(stream)
    assert len(segments) > 5
    assert "".join(segment.text for segment in segments) == whole.text
    assert stream.answer.token_ids == whole.token_ids
    assert stream.answer.finish_reason == whole.finish_reason == "length"
    assert set(stream.answer.timings) == set(whole.timings)


def test_options_draw_the_same(vl):
    options = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.9, "seed": 4}
    assert vl.stream("Hi", **options).finish().token_ids == vl.generate("Hi", **options).token_ids


TAGS = "<ref> </ref> <box> </box> <quad> </quad> (1,2),(30,40) (5,6) (1,2),(3,4),(5,6),(7,8)"
WORDS = ["a dog", "图中", "狗", "é", "<", "<re", ">", " ", "\n"]
WHOLE = [
    "<ref>a dog</ref>",
    "<ref> </ref>",
    "<box>(1,2),(30,40)</box>",
    "<quad>(1,2),(3,4),(5,6),(7,8)</quad>",
]
text = st.lists(st.sampled_from([*TAGS.split(), *WORDS, *WHOLE * 4]), max_size=12).map("".join)


@settings(deadline=None, max_examples=400)
@given(text=st.one_of(text, st.text(max_size=20)))
def test_segments_of_any_text(tokenizer, text):
    """The same boxes and text as from parsing the whole answer, however tokens split it."""
    for tags in ("all", ()):
        ids = tokenizer.encode(text.replace("<img>", ""), allowed_special=tags)
        builder = SegmentBuilder(tokenizer)
        segments = [segment for token in ids for segment in builder.add(token)] + list(builder.finish())
        said = tokenizer.decode(ids)
        assert "".join(segment.text for segment in segments) == said
        assert [box for segment in segments for box in segment.boxes] == parse_boxes(said).boxes
        assert all(segment.text for segment in segments)


@settings(deadline=None)
@given(data=st.binary(max_size=12))
def test_any_bytes(tokenizer, data):
    builder = SegmentBuilder(tokenizer)
    segments = [segment for byte in data for segment in builder.add(byte)] + list(builder.finish())
    assert "".join(segment.text for segment in segments) == data.decode("utf-8", "replace")


def test_words_come_at_once_and_characters_whole(tokenizer):
    builder = SegmentBuilder(tokenizer)
    assert [list(builder.add(byte)) for byte in b"ab"] == [[Segment("a")], [Segment("b")]]
    assert [list(builder.add(byte)) for byte in "狗".encode()] == [[], [], [Segment("狗")]]


def test_refs_and_boxes_come_whole(tokenizer):
    builder = SegmentBuilder(tokenizer)
    ids = tokenizer.encode("Here: <ref>the dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>.")
    segments = [segment for token in ids for segment in builder.add(token)]
    tagged = [segment for segment in segments if segment.ref or segment.boxes]
    assert [segment.ref for segment in tagged] == ["the dog", None, None]
    assert [box.ref for segment in tagged for box in segment.boxes] == ["the dog", "the dog"]
    assert [box.points for segment in tagged for box in segment.boxes] == [((1, 2), (3, 4)), ((5, 6), (7, 8))]
    assert segments[-1] == Segment(".")


def test_a_closed_stream_stops_the_work(vl, work):
    with vl.stream(IMAGE_QUERY, max_new_tokens=40) as stream:
        list(itertools.islice(stream, 2))
    n_steps = len(work.steps)
    assert n_steps < 20
    assert list(stream) == []
    assert len(work.steps) == n_steps
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.token_ids == vl.generate(IMAGE_QUERY, max_new_tokens=40).token_ids[:n_steps]


def test_wrong_requests_fail_before_the_first_segment(vl):
    with pytest.raises(UsageError, match="top_p"):
        vl.stream("Hi", top_p=2)
    with pytest.raises(UsageError, match=r"nothing\.png"):
        vl.stream([{"image": "nothing.png"}])


def test_an_image_is_encoded_once(vl, work):
    vl.generate(IMAGE_QUERY, max_new_tokens=1)
    vl.generate([*IMAGE_QUERY, {"text": " Again?"}], max_new_tokens=1)
    assert work.done.count("encode") == 1
    vl.generate(OTHER_IMAGE_QUERY, max_new_tokens=1)
    assert work.done.count("encode") == 2


def test_image_cache_forgets_the_least_recently_used():
    features = np.zeros([4, 4], np.float32)
    cache = ImageCache(max_bytes=2 * features.nbytes)
    encoded = []
    for image in (0, 1, 0, 2, 0, 1):
        if cache.get(b"%d" % image) is None:
            encoded.append(image)
            cache.put(b"%d" % image, features)
    assert encoded == [0, 1, 2, 1]


def fresh(vl, history, query, n_tokens):
    """The same turn, computed from its history."""
    return vl.generate(query, chat=True, history=list(history), max_new_tokens=n_tokens).token_ids


def test_chat_computes_only_new_tokens(vl, work):
    """On the engine a turn begins where the full blocks of the last one end; no image is encoded again on either."""
    chat = vl.chat()
    first = chat.ask(IMAGE_QUERY, max_new_tokens=4).finish()
    n_first = work.steps[0]
    del work.done[:]
    second = chat.ask("Sure?", max_new_tokens=6).finish()
    assert "encode" not in work.done
    before, now = turns(vl, [(IMAGE_QUERY, first.text.strip())], "Sure?")
    before += [(token, True) for token in first.token_ids[:-1]]
    common = next(n for n, (a, b) in enumerate(zip([*before, None], now)) if a != b)
    assert common >= n_first
    n_cached = common // 32 * 32 if isinstance(work._executor, EngineExecutor) else 0
    assert work.steps[0] == len(now) - n_cached
    assert second.image_size == first.image_size == (960, 640)
    assert [answer for _, answer in chat.history] == [first.text.strip(), second.text.strip()]
    vl._loop = Loop(work._executor)  # without cached content
    assert second.token_ids == fresh(vl, [(IMAGE_QUERY, first.text.strip())], "Sure?", 6)


def turns(vl, history, query):
    """The prompts of the last turn of a history and of the next one: each token, and whether it was generated."""
    for end, asked in ((len(history) - 1, history[-1][0]), (len(history), [{"text": query}])):
        prompt = prompts.chat_prompt(vl.tokenizer, asked, history[:end])
        inside = {place for span in prompt.generated for place in range(*span)}
        yield [(token, place in inside) for place, token in enumerate(prompt.input_ids)]


def test_chat_equals_the_same_turns_without_a_cache(vl):
    """Six turns, past where the rotary base grows, with new and repeated images, and a truncated answer."""
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
            n_said = len(stream.answer.token_ids)
            assert 0 < n_said < 8
            assert stream.answer.token_ids == expected[:n_said]
        else:
            assert stream.finish().token_ids == expected
    assert len(chat.history) == 6


def test_chat_drops_its_oldest_turns(vl, monkeypatch):
    """The next prompt begins with another image: the common part of both names is not reused."""
    short = functools.partial(prompts.chat_prompt, max_window=600)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.chat.chat_prompt", short)
    monkeypatch.setattr("paddlemix_qwenvl_plugin.runtime.predictor.chat_prompt", short)
    chat = vl.chat()
    for query in (IMAGE_QUERY, OTHER_IMAGE_QUERY, IMAGE_QUERY, "Why?", OTHER_IMAGE_QUERY):
        expected = fresh(vl, chat.history, query if isinstance(query, list) else [{"text": query}], 6)
        assert chat.ask(query, max_new_tokens=6).finish().token_ids == expected


def test_chat_forgets(vl, work):
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


def test_stop_ends_after_the_token_in_work(vl, work):
    """Also while no segment is complete; held text is delivered: the segments join to the answer's text."""
    chat = vl.chat()
    stream = chat.ask(IMAGE_QUERY, max_new_tokens=40)
    said = [next(stream).text]
    work.before_step = stream.stop
    n_steps = len(work.steps)
    said += [segment.text for segment in stream]
    assert len(work.steps) == n_steps + 1
    assert "".join(said) == stream.answer.text
    assert stream.answer.finish_reason == "cancelled"
    assert [answer for _, answer in chat.history] == [stream.answer.text.strip()]


def test_a_stream_stopped_before_its_first_token_is_not_recorded(vl, work):
    chat = vl.chat()
    stream = chat.ask("Hello", max_new_tokens=4)
    stream.stop()
    assert list(stream) == []
    assert work.done == []
    assert chat.history == ()


def test_a_turn_that_fails_in_the_middle_is_not_recorded(vl, work):
    chat = vl.chat()
    first = chat.ask(IMAGE_QUERY, max_new_tokens=4).finish()
    stream = chat.ask("Sure?", max_new_tokens=8)
    next(stream)

    def fail():
        raise QwenVLError("out of memory")

    work.before_step = fail
    with pytest.raises(QwenVLError, match="out of memory"):
        list(stream)
    work.before_step = lambda: None
    assert [answer for _, answer in chat.history] == [first.text.strip()]
    expected = fresh(vl, chat.history, "Sure?", 8)
    assert chat.ask("Sure?", max_new_tokens=8).finish().token_ids == expected
