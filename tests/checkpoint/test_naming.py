"""Naming schemes, layouts ([in, out] or [out, in]) and file formats: all give the same canonical tensors."""

from __future__ import annotations

import numpy as np
import pytest
from folders import LINEAR, renamed, write

from paddlemix_qwenvl_plugin import QwenVLError
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint


def canonical(name):
    """Translate PaddleMIX's name of a tensor to the canonical name, independently of the package."""
    return name.replace("transformer.llm.", "").replace("visual.vit.", "visual.")


def read(folder):
    checkpoint = Checkpoint(folder)
    return dict(checkpoint.tensors({**checkpoint.language, **checkpoint.vision}, "float32"))


@pytest.mark.parametrize("kind", ["safetensors", "pdparams", "sharded-safetensors", "sharded-pdparams"])
@pytest.mark.parametrize(
    ("scheme", "transpose"),
    [
        ("paddlemix", False),
        ("static", False),
        ("huggingface", True),
        ("huggingface", False),
        ("static", True),
    ],
)
def test_same_tensors(golden, tmp_path, scheme, transpose, kind):
    model = golden("b")
    folder = write(tmp_path, model.folder / "config.json", renamed(model.weights, scheme, transpose), kind)
    tensors = read(folder)
    assert set(tensors) == {canonical(name) for name in model.weights}
    for name, value in model.weights.items():
        np.testing.assert_array_equal(tensors[canonical(name)], value)
    assert Checkpoint(folder).fingerprint() == Checkpoint(model.folder).fingerprint()


def test_buffers_of_older_checkpoints_are_ignored(golden, tmp_path):
    model = golden("a")
    weights = dict(model.weights)
    weights["transformer.llm.h.0.attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    assert set(read(write(tmp_path, model.folder / "config.json", weights, "safetensors"))) == {
        canonical(name) for name in model.weights
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: weights.pop("transformer.llm.ln_f.weight"), "tensor ln_f.weight is missing"),
        (
            lambda weights: weights.update(extra=np.ones(3, np.float32)),
            "tensor extra is not part of this model",
        ),
        (
            lambda weights: weights.update({"visual.ln_post.bias": np.ones(7, np.float32)}),
            r"visual.ln_post.bias has shape \[7\], config.json requires \[256\]",
        ),
        (
            lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"].T.copy()}),
            r"lm_head.weight is laid out \[out, in\], unlike",
        ),
        (
            lambda weights: weights.update({"qwen.ln_f.weight": weights["transformer.llm.ln_f.weight"]}),
            "tensor qwen.ln_f.weight is not part of this model",
        ),
        (lambda weights: weights.pop("transformer.llm.wte.weight"), "not a Qwen-VL checkpoint"),
    ],
)
def test_errors_name_the_tensor(golden, tmp_path, damage, message):
    model = golden("b")
    weights = dict(model.weights)
    damage(weights)
    folder = write(tmp_path, model.folder / "config.json", weights, "safetensors")
    with pytest.raises(QwenVLError, match=message):
        Checkpoint(folder)


def test_linear_pattern_covers_fused_projections(golden):
    """`LINEAR`, for names of linear weights, matches all matrices 3 times as wide as high: the fused projections."""
    model = golden("b")
    fused = [
        name
        for name, value in model.weights.items()
        if value.ndim == 2 and value.shape[1] == 3 * value.shape[0]
    ]
    assert fused
    assert all(LINEAR.search(name) for name in fused)
