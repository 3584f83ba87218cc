"""Both exported graphs in Paddle Inference, PIR and legacy, against figures of the real PaddleMIX model."""

from __future__ import annotations

import numpy as np
import pytest
from stock_inputs import stock_feed

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.runtime.programs import Stage

pytestmark = [
    pytest.mark.parametrize("name", ["a", "b"]),
    pytest.mark.parametrize("extension", [".json", ".pdmodel"]),
]


def program(prefix, extension):
    return prefix.with_name(prefix.name + extension)


@pytest.fixture
def pair(golden, name, extension):
    model = golden(name)
    vl = QwenVL.from_exported(
        program(model.vision, extension), program(model.language, extension), model.folder
    )
    return model, vl, vl.encode_images(model.images)


def test_features(pair):
    model, _, features = pair
    expected = model.figures["features_every_16th_query"]
    assert features.dtype == np.float32
    assert np.abs(features[:, ::16] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_predictor_tokens(pair):
    model, vl, features = pair
    tokens = vl.generate_ids(model.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [model.figures["tokens"].tolist()]


def test_step_program_logits(pair, extension):
    """The prompt in two pieces, then its last tokens and the decode one by one: every logit of the goldens."""
    model, _, features = pair
    step = Stage(program(model.language, extension), "language", "cpu").open(".step")
    ids = model.input_ids
    length = ids.shape[1]
    config = model.config
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    state = {
        "valid": np.zeros([1, 1], bool),
        "caches": [np.zeros([1, heads, 1, head_dim], np.float32)] * (2 * config["num_hidden_layers"]),
        "past": 0,
    }

    def feed(chunk, pictures, img_pos):
        n = chunk.shape[1]
        numbers = [np.array([[value]], np.int64) for value in (n, state["past"], length)]
        outputs = step([chunk, pictures, img_pos, *numbers, state["valid"], *state["caches"]])
        state["valid"] = np.concatenate([state["valid"], np.ones([1, n], bool)], axis=1)
        state["caches"], state["past"] = outputs[1:], state["past"] + n
        return outputs[0].numpy()[0]

    nothing = np.zeros_like(features[:1]), np.array([[-1, 0, 0]], np.int64)
    first = feed(ids[:, : length - 7], features, model.img_pos)
    expected = model.figures["prefill_logits_last8"][0]
    np.testing.assert_allclose(first, expected[0], atol=1e-3, rtol=0)
    for i in range(1, 8):
        logits = feed(ids[:, length - 8 + i : length - 7 + i], *nothing)
        np.testing.assert_allclose(logits, expected[i], atol=1e-3, rtol=0)
    for token, row in zip(model.figures["tokens"], model.figures["decode_logits"]):
        assert logits.argmax() == token
        logits = feed(np.array([[token]]), *nothing)
        np.testing.assert_allclose(logits, row, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mask_axes", [2, 4])
def test_stock_contract(pair, extension, mask_axes):
    """What the stock predictor feeds, in its order: the tokens come out, and the five stock outputs."""
    model, _, features = pair
    stock = Stage(program(model.language, extension), "language", "cpu").open()
    feed = stock_feed(model.config, model.input_ids, features, model.img_pos, max_new=24, mask_axes=mask_axes)
    next_tokens, step_idx, stop_flags, seq_len_decoder, tgt_pos, tokens = (o.numpy() for o in stock(feed))
    assert tokens.tolist() == [model.figures["tokens"].tolist()]
    assert next_tokens.tolist() == [[model.figures["tokens"][-1]]]
    assert (step_idx.tolist(), stop_flags.tolist(), seq_len_decoder.tolist()) == ([[24]], [[1]], [[0]])
    assert tgt_pos.tolist() == [[model.input_ids.shape[1] + 23]]
    assert [o.dtype.name for o in (next_tokens, step_idx, stop_flags, seq_len_decoder, tgt_pos, tokens)] == [
        "int64",
        "int64",
        "int32",
        "int32",
        "int64",
        "int64",
    ]
