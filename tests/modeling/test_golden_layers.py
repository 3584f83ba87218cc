"""The layers in Paddle's dynamic mode, compared with the goldens, recorded outputs of PaddleMIX's own model."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.modeling.weights import load_language, load_vision

pytestmark = pytest.mark.parametrize("name", ["a", "b"])


def features_of(model):
    with paddle.no_grad():
        return load_vision(Checkpoint(model.folder))(paddle.to_tensor(model.images))


def test_features(golden, name):
    model = golden(name)
    expected = model.figures["features_every_16th_query"]
    found = features_of(model).numpy()[:, ::16]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@paddle.no_grad()
def test_prefill_and_decode(golden, name):
    model = golden(name)
    language = load_language(Checkpoint(model.folder))
    ids = paddle.to_tensor(model.input_ids)
    length = ids.shape[1]
    prompt_len = paddle.to_tensor([[length]])
    embeddings = language.embed(ids, features_of(model), paddle.to_tensor(model.img_pos))
    positions = paddle.arange(length).unsqueeze(0)

    # The logits of the last 8 positions, each from a prefill that ends there.
    for row, expected in enumerate(model.figures["prefill_logits_last8"][0]):
        n = length - 7 + row
        logits, caches = language(embeddings[:, :n], positions[:, :n], prompt_len, paddle.to_tensor([[n]]))
        np.testing.assert_allclose(logits.numpy()[0], expected, atol=1e-3, rtol=0)

    valid = paddle.ones([1, length], dtype="bool")
    for i, (token, expected) in enumerate(zip(model.figures["tokens"], model.figures["decode_logits"])):
        assert int(logits.argmax()) == token
        embedded = language.embed_tokens(paddle.to_tensor([[int(token)]]))
        position = paddle.to_tensor([[length + i]])
        n_new = paddle.to_tensor([[1]])
        logits, caches = language(embedded, position, prompt_len, n_new, valid, caches)
        valid = paddle.concat([valid, paddle.ones([1, 1], dtype="bool")], axis=1)
        np.testing.assert_allclose(logits.numpy()[0], expected, atol=1e-3, rtol=0)
