"""Merged weights equal those that PEFT and PaddleNLP merge, in every naming scheme of the base."""

from __future__ import annotations

import json
import shutil

import numpy as np
import paddle
import pytest
from lora_folders import LORA, base, copied, delta, make_peft, pair, save, settings, tensors, write_base
from quantised_folders import Variant, write_quantised

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast, to_float32

C_ATTN, W1, LM_HEAD = "h.0.attn.c_attn.weight", "h.0.mlp.w1.weight", "lm_head.weight"


def merged(folder, *lora, dtype="float32", out_in=False):
    checkpoint = Checkpoint(folder, lora)
    return dict(checkpoint.tensors({**checkpoint.language, **checkpoint.vision}, dtype, out_in))


@pytest.mark.parametrize("scheme", ["paddlemix", "huggingface", "static"])
@pytest.mark.parametrize("adapter", ["peft", "peft_rslora", "paddlenlp", "paddlenlp_rslora"])
def test_the_weights_are_those_that_the_library_merges(tmp_path, adapter, scheme):
    expected = np.load(LORA / adapter / "merged.npz")
    values = merged(write_base(tmp_path / "model", scheme), LORA / adapter)
    untouched = base.weights()
    assert values.keys() == untouched.keys()
    assert len(expected.files) >= 5
    for name, value in values.items():
        if name in expected.files:
            np.testing.assert_allclose(
                base.sample(name, value), expected[name], rtol=0, atol=1e-6, err_msg=name
            )
        else:
            np.testing.assert_array_equal(value, untouched[name], err_msg=name)


def test_out_in_is_the_transpose(tmp_path):
    folder = write_base(tmp_path / "model", "huggingface")
    values, turned = merged(folder, LORA / "peft"), merged(folder, LORA / "peft", out_in=True)
    np.testing.assert_array_equal(turned[C_ATTN], values[C_ATTN].T)
    np.testing.assert_array_equal(turned["wte.weight"], values["wte.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_sum_is_rounded_once(tmp_path, dtype):
    """The sum is computed in float32 for every storage type."""
    folder = write_base(tmp_path / "model")
    exact = merged(folder, LORA / "peft")[C_ATTN]
    np.testing.assert_array_equal(
        merged(folder, LORA / "peft", dtype=dtype)[C_ATTN], cast(exact, "float32", dtype, C_ATTN)
    )


def test_adapters_add_up_with_their_weights(tmp_path):
    first = make_peft(tmp_path / "first", pair("transformer.h.0.attn.c_attn", 128, 384))
    second = make_peft(
        tmp_path / "second",
        {
            **pair("transformer.h.0.attn.c_attn", 128, 384, 3, "2"),
            **pair("transformer.h.0.mlp.w1", 128, 64, 3),
        },
        r=3,
        lora_alpha=9,
        use_rslora=True,
    )
    values = merged(write_base(tmp_path / "model"), (first, 0.5), (second, -2))
    one = delta(tensors(first), "base_model.model.transformer.h.0.attn.c_attn", 4, 2)
    two = delta(tensors(second), "base_model.model.transformer.h.0.attn.c_attn", 9, 3, rslora=True)
    gate = delta(tensors(second), "base_model.model.transformer.h.0.mlp.w1", 9, 3, rslora=True)
    was = base.weights()
    np.testing.assert_allclose(values[C_ATTN], was[C_ATTN] + 0.5 * one - 2 * two, rtol=0, atol=1e-6)
    np.testing.assert_allclose(values[W1], was[W1] - 2 * gate, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(values[LM_HEAD], was[LM_HEAD])


def test_a_replaced_tensor_with_a_weight_lies_between(tmp_path):
    new = base.random("new", 40, 128)
    adapter = make_peft(tmp_path / "adapter", {"lm_head.weight": new}, modules_to_save=["lm_head"])
    folder, was = write_base(tmp_path / "model", "huggingface"), base.weights()[LM_HEAD]
    np.testing.assert_array_equal(merged(folder, adapter)[LM_HEAD], new.T)
    quarter = merged(folder, (adapter, 0.25))[LM_HEAD]
    np.testing.assert_allclose(quarter, 0.75 * was.astype(np.float64) + 0.25 * new.T, rtol=0, atol=1e-6)


def test_an_update_is_added_to_another_adapters_replacement(tmp_path):
    update = make_peft(tmp_path / "update", pair("lm_head", 128, 40))
    new = base.random("new", 40, 128)
    whole = make_peft(tmp_path / "whole", {"lm_head.weight": new})
    expected = new.T + delta(tensors(update), "base_model.model.lm_head", 4, 2)
    values = merged(write_base(tmp_path / "model"), update, whole)[LM_HEAD]
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


def test_names_with_the_adapter_in_them(tmp_path):
    halves = pair("transformer.h.0.attn.c_attn", 128, 384)
    plain = make_peft(tmp_path / "plain", halves)
    named = make_peft(
        tmp_path / "named",
        {key.replace(".weight", ".default.weight"): value for key, value in halves.items()},
    )
    folder = write_base(tmp_path / "model")
    np.testing.assert_array_equal(merged(folder, named)[C_ATTN], merged(folder, plain)[C_ATTN])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_half_precision(tmp_path, dtype):
    halves = pair("transformer.h.0.attn.c_attn", 128, 384)
    adapter = make_peft(tmp_path / "adapter", halves)
    rounded = {key: cast(value, "float32", dtype, key) for key, value in tensors(adapter).items()}
    safetensors_file.write(adapter / "adapter_model.safetensors", rounded, dtype)
    exact = {key: to_float32(value, dtype) for key, value in rounded.items()}
    update = delta(exact, "base_model.model.transformer.h.0.attn.c_attn", 4, 2)
    values = merged(write_base(tmp_path / "model"), adapter)[C_ATTN]
    np.testing.assert_allclose(values, base.weights()[C_ATTN] + update, rtol=0, atol=1e-6)


def test_patterns_match_whole_names_from_their_end(tmp_path):
    """As in PEFT, the first key that is the end of a module's name applies; ^ anchors it at the beginning."""
    modules = {"transformer.h.0.mlp.w1": (128, 64), "transformer.h.1.mlp.w1": (128, 64)}
    values = {key: half for module, size in modules.items() for key, half in pair(module, *size).items()}
    alphas = {"^mlp.w1": 100, "lp.w1": 100, r"^transformer\.h\.0\.mlp\.w1": 7, "mlp.w1": 5}
    adapter = make_peft(tmp_path / "adapter", values, alpha_pattern=alphas)
    found = merged(write_base(tmp_path / "model"), adapter)
    for layer, alpha in ((0, 7), (1, 5)):
        name = f"h.{layer}.mlp.w1.weight"
        update = delta(tensors(adapter), f"base_model.model.transformer.h.{layer}.mlp.w1", alpha, 2)
        np.testing.assert_allclose(found[name], base.weights()[name] + update, rtol=0, atol=1e-6)


def test_shards_of_paddlenlps_unified_checkpoint(tmp_path):
    adapter = copied("paddlenlp", tmp_path / "adapter")
    whole = paddle.load(str(adapter / "lora_model_state.pdparams"), return_numpy=True)
    index = {}
    for i in range(2):
        file = f"peft_model-{i + 1:05d}-of-00002.safetensors"
        shard = {name: whole[name] for name in list(whole)[i::2]}
        safetensors_file.write(adapter / file, shard, "float32")
        index.update(dict.fromkeys(shard, file))
    (adapter / "lora_model_state.pdparams").unlink()
    (adapter / "peft_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    folder = write_base(tmp_path / "model")
    expected = merged(folder, LORA / "paddlenlp")
    for name, value in merged(folder, adapter).items():
        np.testing.assert_array_equal(value, expected[name])


def test_fingerprints(tmp_path):
    """The model's changes with what an adapter does to the vision stage, not with its format or the language model."""
    folder = write_base(tmp_path / "model")
    plain = Checkpoint(folder).fingerprint()
    assert Checkpoint(folder, [LORA / "paddlenlp"]).fingerprint() == plain
    vision = Checkpoint(folder, [LORA / "peft"]).fingerprint()
    half = Checkpoint(folder, [(LORA / "peft", 0.5)]).fingerprint()
    other = copied("peft", tmp_path / "other")
    settings(other, lora_alpha=17)
    assert len({plain, vision, half, Checkpoint(folder, [other]).fingerprint()}) == 4
    hugging_face = write_base(tmp_path / "hugging_face", "huggingface")
    assert Checkpoint(hugging_face, [LORA / "peft"]).fingerprint() == vision

    values = pair("transformer.h.0.attn.c_attn", 128, 384)
    one = make_peft(tmp_path / "one", values)
    two = tmp_path / "two"
    two.mkdir()
    (two / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    module = "transformer.llm.h.0.attn.c_attn"
    save(
        two,
        dict(zip((f"{module}.lora_A", f"{module}.lora_B"), (value.T.copy() for value in values.values()))),
    )
    [(first, _)], [(second, _)] = (Checkpoint(folder, [path]).merge.adapters for path in (one, two))
    assert first.fingerprint(first.names) == second.fingerprint(second.names)
    shutil.rmtree(two)


def test_a_missing_module_to_save_is_noted(tmp_path, capfd):
    adapter = make_peft(tmp_path / "adapter", pair("lm_head", 128, 40), modules_to_save=["wte", "ln_f"])
    Checkpoint(write_base(tmp_path / "model"), [adapter])
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition("modules_to_save has ")[2].partition(",")[0] for line in lines] == ["wte", "ln_f"]


def test_one_path_in_place_of_a_list(tmp_path):
    folder = write_base(tmp_path / "model")
    [(adapter, weight)] = Checkpoint(folder, str(LORA / "paddlenlp")).merge.adapters
    assert (adapter.folder, weight) == (LORA / "paddlenlp", 1.0)


def test_a_quantized_checkpoint_takes_adapters_of_its_other_weights(tmp_path):
    write_quantised(tmp_path / "model", Variant())
    module = "visual.transformer.resblocks.0.mlp.c_fc"
    adapter = make_peft(tmp_path / "adapter", pair(f"transformer.{module}", 16, 32))
    name = f"{module}.weight"
    plain, changed = (
        dict(checkpoint.tensors({name: checkpoint.vision[name]}, "float32"))
        for checkpoint in (Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "model", [adapter]))
    )
    update = delta(tensors(adapter), f"base_model.model.transformer.{module}", 4, 2)
    np.testing.assert_allclose(changed[name], plain[name] + update, rtol=0, atol=1e-6)
