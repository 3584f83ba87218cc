"""Both exported stages, opened from PIR and legacy programs, compared with recorded outputs of PaddleMIX's model.

Tests with the fixture `opened` run on the engine and on the portable graph.
"""

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
def opened(golden, name, extension, engine):
    model = golden(name)
    vl = QwenVL.from_exported(
        program(model.vision, extension), program(model.language, extension), model.folder
    )
    return model, vl, vl.encode_images(model.images)


def test_features(opened):
    model, _, features = opened
    expected = model.figures["features_every_16th_query"]
    assert features.dtype == np.float32
    assert np.abs(features[:, ::16] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_predictor_tokens(opened):
    model, vl, features = opened
    tokens = vl.generate_ids(model.input_ids, features, max_new_tokens=24, eos_token_ids=())
    assert tokens == [model.figures["tokens"].tolist()]


def test_step_program_logits(golden, name, extension, monkeypatch):
    """The step program of the portable graph computes the logits of the goldens.

    In chunks: the prompt without its last seven tokens, then these and the completion one by one. The engine's test is
    tests/csrc/test_golden_engine.py.
    """
    monkeypatch.setenv("QWENVL_ENGINE", "portable")
    model = golden(name)
    [features] = Stage(program(model.vision, extension), "vision", "cpu").open()([model.images])
    stage = Stage(program(model.language, extension), "language", "cpu")
    step = stage.open(".step")
    config, ids = stage.manifest.config, model.input_ids[0]
    shape = [1, config.num_attention_heads, 1, config.head_dim]
    cache = [step.zeros(shape, "float32") for _ in range(2 * config.num_hidden_layers)]
    n_past = 0
    no_images = np.zeros([1, config.visual.n_queries, config.hidden_size], "float32"), np.array([[-1, 0, 0]])

    def run(chunk, images=no_images):
        nonlocal cache, n_past
        # Numbers of tokens: in the chunk, in the cache, in the prompt.
        lengths = (np.array([[n]]) for n in (len(chunk), n_past, len(ids)))
        # The cache begins with an unused position, since Paddle Inference accepts no empty tensors.
        cache_valid = np.arange(n_past + 1)[None] > 0
        logits, *cache = step([np.array([chunk]), *images, *lengths, cache_valid, *cache])
        n_past += len(chunk)
        return logits.numpy()[0]

    logits = run(ids[:-7], (features.numpy(), model.img_pos))
    expected = model.figures["prefill_logits_last8"][0]
    np.testing.assert_allclose(logits, expected[0], atol=1e-3, rtol=0)
    for token, row in zip(ids[-7:], expected[1:]):
        logits = run([token])
        np.testing.assert_allclose(logits, row, atol=1e-3, rtol=0)
    for token, row in zip(model.figures["tokens"], model.figures["decode_logits"]):
        assert logits.argmax() == token
        logits = run([token])
        np.testing.assert_allclose(logits, row, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mask_axes", [2, 4])
def test_stock_contract(opened, extension, mask_axes):
    """The stock predictor's inputs, in its order, give its five outputs and, as the sixth, the golden tokens.

    With an attention mask of 2 axes, as the program declares it, or of 4, as the stock scripts feed it.
    """
    model, _, features = opened
    stock = Stage(program(model.language, extension), "language", "cpu").open()
    feed = stock_feed(model.config, model.input_ids, features, model.img_pos, max_new=24, mask_axes=mask_axes)
    outputs = [output.numpy() for output in stock(feed)]
    next_tokens, step_idx, stop_flags, seq_len_decoder, tgt_pos, tokens = outputs
    assert tokens.tolist() == [model.figures["tokens"].tolist()]
    assert next_tokens.tolist() == [[model.figures["tokens"][-1]]]
    assert (step_idx.tolist(), stop_flags.tolist(), seq_len_decoder.tolist()) == ([[24]], [[1]], [[0]])
    assert tgt_pos.tolist() == [[model.input_ids.shape[1] + 23]]
    dtypes = [output.dtype.name for output in outputs]
    assert dtypes == ["int64", "int64", "int32", "int32", "int64", "int64"]
