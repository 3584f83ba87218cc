"""Weights merged with adapters equal those merged by PEFT and PaddleNLP, in every naming scheme of the base model.

Where a test does not say otherwise, an update has rank 2 and alpha 4 (lora_folders.py). The base model has the hidden
size 128 and a vocabulary of 40 tokens.
"""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from lora_folders import (
    LORA,
    base,
    change_settings,
    copy_adapter,
    dense_update,
    make_peft,
    read_tensors,
    save_tensors,
    update_tensors,
    write_base,
)
from quantized_folders import Variant, write_quantized

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast, to_float32

C_ATTN, W1, LM_HEAD = "h.0.attn.c_attn.weight", "h.0.mlp.w1.weight", "lm_head.weight"


def merged(folder, *lora, dtype="float32", out_in=False):
    checkpoint = Checkpoint(folder, lora)
    return dict(checkpoint.tensors({**checkpoint.language, **checkpoint.vision}, dtype, out_in))


@pytest.mark.parametrize("scheme", ["paddlemix", "huggingface", "static"])
@pytest.mark.parametrize("adapter", ["peft", "peft_rslora", "paddlenlp", "paddlenlp_rslora"])
def test_weights_as_merged_by_the_adapters_library(tmp_path, adapter, scheme):
    expected = np.load(LORA / adapter / "merged.npz")
    values = merged(write_base(tmp_path / "model", scheme), LORA / adapter)
    original = base.weights()
    assert values.keys() == original.keys()
    assert len(expected.files) >= 5
    for name, value in values.items():
        if name in expected.files:
            np.testing.assert_allclose(
                base.sample(name, value), expected[name], rtol=0, atol=1e-6, err_msg=name
            )
        else:
            np.testing.assert_array_equal(value, original[name], err_msg=name)


def test_out_in_is_the_transpose(tmp_path):
    folder = write_base(tmp_path / "model", "huggingface")
    values, transposed = merged(folder, LORA / "peft"), merged(folder, LORA / "peft", out_in=True)
    np.testing.assert_array_equal(transposed[C_ATTN], values[C_ATTN].T)
    np.testing.assert_array_equal(transposed["wte.weight"], values["wte.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_is_rounded_once(tmp_path, dtype):
    """Weight and update are added in float32 for every storage type, and the sum is rounded."""
    folder = write_base(tmp_path / "model")
    exact = merged(folder, LORA / "peft")[C_ATTN]
    np.testing.assert_array_equal(
        merged(folder, LORA / "peft", dtype=dtype)[C_ATTN], cast(exact, "float32", dtype, C_ATTN)
    )


def test_adapters_add_up_with_their_weights(tmp_path):
    first = make_peft(tmp_path / "first", update_tensors("transformer.h.0.attn.c_attn", 128, 384))
    second = make_peft(
        tmp_path / "second",
        {
            **update_tensors("transformer.h.0.attn.c_attn", 128, 384, rank=3, seed="2"),
            **update_tensors("transformer.h.0.mlp.w1", 128, 64, rank=3),
        },
        r=3,
        lora_alpha=9,
        use_rslora=True,
    )
    values = merged(write_base(tmp_path / "model"), (first, 0.5), (second, -2))
    first_update = dense_update(
        read_tensors(first), "base_model.model.transformer.h.0.attn.c_attn", alpha=4, rank=2
    )
    second_update = dense_update(
        read_tensors(second), "base_model.model.transformer.h.0.attn.c_attn", alpha=9, rank=3, rslora=True
    )
    w1_update = dense_update(
        read_tensors(second), "base_model.model.transformer.h.0.mlp.w1", alpha=9, rank=3, rslora=True
    )
    original = base.weights()
    np.testing.assert_allclose(
        values[C_ATTN], original[C_ATTN] + 0.5 * first_update - 2 * second_update, rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(values[W1], original[W1] - 2 * w1_update, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(values[LM_HEAD], original[LM_HEAD])


def test_a_weighted_replacement_is_interpolated(tmp_path):
    new = base.random("new", 40, 128)
    adapter = make_peft(tmp_path / "adapter", {"lm_head.weight": new}, modules_to_save=["lm_head"])
    folder, original = write_base(tmp_path / "model", "huggingface"), base.weights()[LM_HEAD]
    np.testing.assert_array_equal(merged(folder, adapter)[LM_HEAD], new.T)
    quarter = merged(folder, (adapter, 0.25))[LM_HEAD]
    np.testing.assert_allclose(quarter, 0.75 * original.astype(np.float64) + 0.25 * new.T, rtol=0, atol=1e-6)


def test_an_update_is_added_to_another_adapters_replacement(tmp_path):
    update = make_peft(tmp_path / "update", update_tensors("lm_head", 128, 40))
    new = base.random("new", 40, 128)
    replacement = make_peft(tmp_path / "replacement", {"lm_head.weight": new})
    expected = new.T + dense_update(read_tensors(update), "base_model.model.lm_head", alpha=4, rank=2)
    values = merged(write_base(tmp_path / "model"), update, replacement)[LM_HEAD]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "lm_head.modules_to_save.weight",
        "lm_head.modules_to_save.default.weight",
        "lm_head.base_layer.weight",
    ],
)
def test_names_of_a_replaced_module(tmp_path, name):
    new = base.random("new", 40, 128)
    adapter = make_peft(tmp_path / "adapter", {name: new})
    np.testing.assert_array_equal(merged(write_base(tmp_path / "model"), adapter)[LM_HEAD], new.T)


def test_tensor_names_with_the_adapters_name(tmp_path):
    tensors = update_tensors("transformer.h.0.attn.c_attn", 128, 384)
    plain = make_peft(tmp_path / "plain", tensors)
    named = make_peft(
        tmp_path / "named",
        {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()},
    )
    folder = write_base(tmp_path / "model")
    np.testing.assert_array_equal(merged(folder, named)[C_ATTN], merged(folder, plain)[C_ATTN])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_half_precision(tmp_path, dtype):
    tensors = update_tensors("transformer.h.0.attn.c_attn", 128, 384)
    adapter = make_peft(tmp_path / "adapter", tensors)
    rounded = {key: cast(value, "float32", dtype, key) for key, value in read_tensors(adapter).items()}
    safetensors_file.write(adapter / "adapter_model.safetensors", rounded, dtype)
    exact = {key: to_float32(value, dtype) for key, value in rounded.items()}
    update = dense_update(exact, "base_model.model.transformer.h.0.attn.c_attn", alpha=4, rank=2)
    values = merged(write_base(tmp_path / "model"), adapter)[C_ATTN]
    np.testing.assert_allclose(values, base.weights()[C_ATTN] + update, rtol=0, atol=1e-6)


def test_alpha_patterns_match_the_end_of_module_names(tmp_path):
    """As in PEFT: the first key applies that is a module's name or its last parts; ^ requires the full name."""
    modules = {"transformer.h.0.mlp.w1": (128, 64), "transformer.h.1.mlp.w1": (128, 64)}
    values = {}
    for module, sizes in modules.items():
        values.update(update_tensors(module, *sizes))
    alphas = {"^mlp.w1": 100, "lp.w1": 100, r"^transformer\.h\.0\.mlp\.w1": 7, "mlp.w1": 5}
    adapter = make_peft(tmp_path / "adapter", values, alpha_pattern=alphas)
    found = merged(write_base(tmp_path / "model"), adapter)
    for layer, alpha in ((0, 7), (1, 5)):
        name = f"h.{layer}.mlp.w1.weight"
        update = dense_update(
            read_tensors(adapter), f"base_model.model.transformer.h.{layer}.mlp.w1", alpha=alpha, rank=2
        )
        np.testing.assert_allclose(found[name], base.weights()[name] + update, rtol=0, atol=1e-6)


def test_shards_of_paddlenlps_unified_checkpoint(tmp_path):
    adapter = copy_adapter("paddlenlp", tmp_path / "adapter")
    tensors = paddle.load(str(adapter / "lora_model_state.pdparams"), return_numpy=True)
    weight_map = {}
    for i in range(2):
        file = f"peft_model-{i + 1:05d}-of-00002.safetensors"
        shard = {name: tensors[name] for name in list(tensors)[i::2]}
        safetensors_file.write(adapter / file, shard, "float32")
        weight_map.update(dict.fromkeys(shard, file))
    (adapter / "lora_model_state.pdparams").unlink()
    (adapter / "peft_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = write_base(tmp_path / "model")
    expected = merged(folder, LORA / "paddlenlp")
    for name, value in merged(folder, adapter).items():
        np.testing.assert_array_equal(value, expected[name])


def test_fingerprints(tmp_path):
    """A model's fingerprint depends on adapters' updates of the vision stage, not on their other updates.

    Nor does it depend on the naming scheme of the base model. An adapter's fingerprint does not depend on its format.
    """
    folder = write_base(tmp_path / "model")
    plain = Checkpoint(folder).fingerprint()
    assert Checkpoint(folder, [LORA / "paddlenlp"]).fingerprint() == plain
    with_vision = Checkpoint(folder, [LORA / "peft"]).fingerprint()
    half = Checkpoint(folder, [(LORA / "peft", 0.5)]).fingerprint()
    other = copy_adapter("peft", tmp_path / "other")
    change_settings(other, lora_alpha=17)
    assert len({plain, with_vision, half, Checkpoint(folder, [other]).fingerprint()}) == 4
    hugging_face = write_base(tmp_path / "hugging_face", "huggingface")
    assert Checkpoint(hugging_face, [LORA / "peft"]).fingerprint() == with_vision

    values = update_tensors("transformer.h.0.attn.c_attn", 128, 384)
    peft = make_peft(tmp_path / "peft", values)
    paddlenlp = tmp_path / "paddlenlp"
    paddlenlp.mkdir()
    (paddlenlp / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    module = "transformer.llm.h.0.attn.c_attn"
    lora_a, lora_b = (value.T.copy() for value in values.values())
    save_tensors(paddlenlp, {f"{module}.lora_A": lora_a, f"{module}.lora_B": lora_b})
    [(first, _)], [(second, _)] = (Checkpoint(folder, [path]).merge.adapters for path in (peft, paddlenlp))
    assert first.fingerprint(first.names) == second.fingerprint(second.names)


def test_a_missing_module_to_save_is_logged(tmp_path, capfd):
    adapter = make_peft(
        tmp_path / "adapter", update_tensors("lm_head", 128, 40), modules_to_save=["wte", "ln_f"]
    )
    Checkpoint(write_base(tmp_path / "model"), [adapter])
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("modules_to_save has ")[2].partition(",")[0] for line in lines] == ["wte", "ln_f"]


def test_one_path_in_place_of_a_list(tmp_path):
    folder = write_base(tmp_path / "model")
    [(adapter, weight)] = Checkpoint(folder, str(LORA / "paddlenlp")).merge.adapters
    assert (adapter.folder, weight) == (LORA / "paddlenlp", 1.0)


def test_a_quantized_checkpoint_accepts_adapters_of_weights_that_are_not_quantized(tmp_path):
    write_quantized(tmp_path / "model", Variant())
    module = "visual.transformer.resblocks.0.mlp.c_fc"
    adapter = make_peft(tmp_path / "adapter", update_tensors(f"transformer.{module}", 16, 32))
    name = f"{module}.weight"
    checkpoint, with_adapter = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "model", [adapter])
    spec = {name: checkpoint.vision[name]}
    original, changed = (dict(each.tensors(spec, "float32")) for each in (checkpoint, with_adapter))
    update = dense_update(read_tensors(adapter), f"base_model.model.transformer.{module}", alpha=4, rank=2)
    np.testing.assert_allclose(changed[name], original[name] + update, rtol=0, atol=1e-6)
