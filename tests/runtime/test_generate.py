"""`QwenVL.generate`: prompts, images, chat and boxes, compared with separate calls and scripted completions."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES, open_model
from executors import script_completion
from PIL import Image

from paddlemix_qwenvl_plugin import QwenVL, QwenVLError, UsageError, load_image, preprocess
from paddlemix_qwenvl_plugin.export.export import export_vision
from paddlemix_qwenvl_plugin.processing.boxes import Box
from paddlemix_qwenvl_plugin.tiny.make import make_tiny

STREET = Path(__file__).parents[2] / "recipes" / "images" / "street.png"


@pytest.fixture(scope="module", params=ENGINES)
def vl(tiny_exported, request):
    return open_model(tiny_exported / "vision" / "vision", tiny_exported / "text" / "qwen", request.param)


def test_equals_separate_calls(vl):
    """`generate` equals separate calls that tokenize, preprocess, encode and generate."""
    parts = [{"image": str(STREET)}, {"text": "What is this?"}]
    answer = vl.generate(parts, max_new_tokens=8)
    ids = vl.tokenizer.encode(f"Picture 1: <img>{STREET}</img>\nWhat is this?")
    assert vl.stream(parts)._generation.prompt == ids
    features = vl.encode_images(preprocess(load_image(STREET))[None])
    tokens = vl.generate_ids([ids], features, max_new_tokens=8)[0]
    assert answer.token_ids == tokens
    assert answer.image_size == (960, 640)
    assert answer.finish_reason == ("stop" if tokens[-1] == vl.tokenizer.eod_id else "length")
    assert {"prepare", "load", "encode_images", "prefill", "decode", "tokens_per_second"} == set(
        answer.timings
    )


def test_bytes_a_data_url_and_a_pil_image_give_the_same_completion(vl):
    data = STREET.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    image = Image.open(io.BytesIO(data))
    completions = [
        vl.generate([{"image": source}, {"text": "Hi"}], max_new_tokens=6).token_ids
        for source in (data, url, image)
    ]
    assert completions[0] == completions[1] == completions[2]


def test_text_only(vl):
    answer = vl.generate("Hello", max_new_tokens=4)
    assert answer.token_ids == vl.generate_ids([vl.tokenizer.encode("Hello")], max_new_tokens=4)[0]
    assert answer.image_size is None


def test_chat_stops_at_turn_tokens(vl, monkeypatch):
    tokenizer = vl.tokenizer
    prompts = script_completion(vl, monkeypatch, [72, 105, tokenizer.im_end_id, 72])
    answer = vl.generate("How?", chat=True, history=[("Who?", "Me.")])
    assert answer.text == "Hi"
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] == tokenizer.im_end_id
    assert tokenizer.decode(prompts[0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nMe.<|im_end|>\n<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_boxes_of_the_answer(vl, monkeypatch):
    completion = vl.tokenizer.encode("<ref>the car</ref><box>(100,200),(500,1000)</box> and <box>(1,2)</box>")
    script_completion(vl, monkeypatch, [*completion, vl.tokenizer.eod_id])
    answer = vl.generate([{"image": str(STREET)}, {"text": "Where?"}])
    assert answer.boxes == (Box("box", ((100, 200), (500, 1000)), "the car"),)
    assert answer.boxes[0].to_pixels(*answer.image_size) == ((96.0, 128.0), (480.0, 640.0))
    assert len(answer.problems) == 1  # the second box has one corner
    assert answer.text.startswith("<ref>the car</ref><box>")
    stream = vl.stream([{"image": str(STREET)}, {"text": "Where?"}])
    segments = list(stream)
    assert "".join(segment.text for segment in segments) == answer.text
    assert tuple(box for segment in segments for box in segment.boxes) == answer.boxes
    assert stream.answer.finish_reason == "stop"


def test_history_needs_chat(vl):
    with pytest.raises(UsageError, match="pass chat=True"):
        vl.generate("a", history=[("b", "c")])


def test_stages_of_different_models_are_refused(tiny_exported, tmp_path):
    make_tiny(tmp_path / "other", seed=2)
    export_vision(tmp_path / "other", tmp_path / "vision")
    with pytest.raises(QwenVLError, match="the two stages come from different models"):
        QwenVL.from_exported(tmp_path / "vision", tiny_exported / "text" / "qwen")


def test_encode_images_checks_shapes(vl):
    assert vl.encode_images(np.zeros([0, 3, 448, 448])).shape == (0, 256, 256)
    with pytest.raises(UsageError, match=r"pixels: shape \[1, 3, 224, 224\], must be \[N, 3, 448, 448\]"):
        vl.encode_images(np.zeros([1, 3, 224, 224]))
