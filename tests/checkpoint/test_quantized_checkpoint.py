"""GPTQ and AWQ checkpoints: integers, scales and zero points are read as they were packed, or refused with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
from quantized_folders import (
    CONFIG,
    LAYERS,
    Variant,
    copy_tool_folder,
    quantized_tensors,
    write_quantized,
    write_tensors,
)

from paddlemix_qwenvl_plugin import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint

VARIANTS = [
    *(Variant(bits=bits, group=group) for bits in (4, 8) for group in (32, 64, 128, 256, -1)),
    *(Variant(bits=bits, act_order=True) for bits in (4, 8)),
    Variant(group=128, act_order=True),
    Variant(group=128, sym=True),
    Variant(bits=8, group=128, sym=True, act_order=True),
    *(Variant(bits=bits, form="gptq_v2", act_order=bits == 4) for bits in (4, 8)),
    # GPTQModel subtracts 1 from all zero points of an int32 word at once, so that a zero borrows from its neighbour;
    # other tools subtract it from each zero point alone.
    *(Variant(bits=bits, quantizer="gptqmodel:1.4.0") for bits in (4, 8)),
    *(Variant("awq", group=group) for group in (32, 64, 128, 256, -1)),
    Variant("awq", group=128, sym=True),
]
IDS = ["-".join(str(value) for value in variant if value) for variant in VARIANTS]


def dequantized(matrix, group):
    """The weight [out, in] in float64, with the inputs in the order of the model."""
    n_in = matrix.integers.shape[1]
    groups = np.arange(n_in) // group
    scales, zeros = matrix.scales.astype(np.float64)[:, groups], matrix.zeros.astype(np.float64)[:, groups]
    values = scales * (matrix.integers - zeros)
    if matrix.order is None:
        return values
    weight = np.full_like(values, np.nan)
    weight[:, matrix.order] = values
    return weight


def engine_group(variant):
    """Group size in the engine's layout: groups of n * 128 inputs, or of all inputs (-1), are split into 128."""
    return variant.group if variant.group in (32, 64) else 128


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_weights_are_read_as_packed(tmp_path, variant):
    dense = write_quantized(tmp_path, variant)
    quantized = Checkpoint(tmp_path).quantized
    order = "_order" if variant.act_order else ""
    assert quantized.quant_type == f"{variant.method}_int{variant.bits}_g{engine_group(variant)}{order}"
    assert quantized.names == [f"h.0.{layer}.weight" for layer in LAYERS]
    for name in quantized.names:
        matrix = quantized.read(name)
        assert (matrix.integers.dtype, matrix.scales.dtype, matrix.zeros.dtype) == ("uint8", "f2", "f2")
        assert (matrix.order is not None) == variant.act_order
        weight = dequantized(matrix, engine_group(variant)).astype(np.float32)
        np.testing.assert_array_equal(weight, dense[f"transformer.{name}"], err_msg=name)


@pytest.mark.parametrize("tool", ["auto_gptq", "auto_awq", "act_order"])
def test_layers_compute_the_same_as_the_tool(tmp_path, tool):
    figures = copy_tool_folder(tool, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    bias_specs = {name: spec for name, spec in checkpoint.language.items() if "bias" in name}
    biases = dict(checkpoint.tensors(bias_specs, "float32"))
    for name in checkpoint.quantized.names:
        weight = dequantized(checkpoint.quantized.read(name), 32)
        x = np.random.RandomState(weight.shape[1]).randn(3, weight.shape[1]).astype("float32")
        y = x @ weight.T + biases.get(name.replace("weight", "bias"), 0)
        layer = name[len("h.0.") : -len(".weight")]
        np.testing.assert_allclose(y, figures[layer], atol=1e-5, rtol=0, err_msg=name)


def test_other_tensors_are_read_as_in_a_float_folder(tmp_path):
    dense = write_quantized(tmp_path / "quantized", Variant())
    write_tensors(tmp_path / "float", dense, CONFIG)
    quantized, plain = Checkpoint(tmp_path / "quantized"), Checkpoint(tmp_path / "float")
    specs = {name: spec for name, spec in plain.language.items() if name not in quantized.quantized.names}
    specs.update(plain.vision)
    expected = dict(plain.tensors(specs, "float32"))
    for name, values in quantized.tensors(specs, "float32"):
        np.testing.assert_array_equal(values, expected.pop(name), err_msg=name)
    assert not expected
    assert (quantized.scheme, quantized.dtype) == ("Hugging Face", "float16")


def test_an_identity_order_is_omitted(tmp_path):
    """Despite `desc_act`, g_idx is that of a folder without act-order, as tools write it with `static_groups`."""
    tensors, _ = quantized_tensors(Variant())
    config = Variant(act_order=True).config
    write_tensors(tmp_path, tensors, {**CONFIG, "quantization_config": config})
    assert Checkpoint(tmp_path).quantized.quant_type == "gptq_int4_g32"


def test_without_g_idx(tmp_path):
    tensors, dense = quantized_tensors(Variant())
    tensors = {name: value for name, value in tensors.items() if not name.endswith("g_idx")}
    write_tensors(tmp_path, tensors, {**CONFIG, "quantization_config": Variant().config})
    quantized = Checkpoint(tmp_path).quantized
    weight = dequantized(quantized.read("h.0.mlp.c_proj.weight"), 32).astype(np.float32)
    np.testing.assert_array_equal(weight, dense["transformer.h.0.mlp.c_proj.weight"])


@pytest.mark.parametrize(
    ("name", "variant", "content"),
    [
        ("quantize_config.json", Variant(group=128), {"bits": 4, "group_size": 128, "desc_act": False}),
        (
            "quant_config.json",
            Variant("awq"),
            {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True},
        ),
    ],
)
def test_the_config_file_of_the_quantization_tool(tmp_path, name, variant, content):
    tensors, dense = quantized_tensors(variant)
    write_tensors(tmp_path, tensors, CONFIG)
    (tmp_path / name).write_text(json.dumps(content))
    quantized = Checkpoint(tmp_path).quantized
    weight = dequantized(quantized.read("h.0.mlp.w1.weight"), variant.group).astype(np.float32)
    np.testing.assert_array_equal(weight, dense["transformer.h.0.mlp.w1.weight"])


@pytest.mark.parametrize("sharded", [False, True])
def test_the_weight_files_of_autogptq(tmp_path, sharded):
    """AutoGPTQ names weight files, shards and their index by bits and group size."""
    dense = write_quantized(tmp_path, Variant(group=-1))
    name = "gptq_model-4bit--1g"
    shard = f"{name}-00001-of-00001.safetensors" if sharded else f"{name}.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / shard)
    if sharded:
        names = safetensors_file.read_header(tmp_path / shard)
        index = {"weight_map": dict.fromkeys(names, shard)}
        (tmp_path / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    weight = dequantized(Checkpoint(tmp_path).quantized.read("h.0.mlp.w2.weight"), 128).astype(np.float32)
    np.testing.assert_array_equal(weight, dense["transformer.h.0.mlp.w2.weight"])


def test_a_quantization_config_file_beside_float_weights_is_ignored(tmp_path):
    _, dense = quantized_tensors(Variant())
    write_tensors(tmp_path, dense, CONFIG)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert Checkpoint(tmp_path).quantized is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method bitsandbytes is not supported, only gptq and awq are",
        ),
        ({"bits": 3}, "gptq with 3 bits is not supported, only 4 and 8"),
        ({"bits": "4"}, "bits must be an integer, not '4'"),
        ({"quant_method": "awq", "bits": 8}, "awq with 8 bits is not supported, only 4"),
        ({"group_size": 48}, "group_size 48 is not supported, only 32, 64, multiples of 128, and -1"),
        ({"group_size": 128 * 10**30}, "group_size 128000000000"),
        ({"group_size": 0}, "group_size 0 is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin is not supported, only gptq and gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format marlin is not supported"),
        ({"quant_method": "awq", "version": "gemv"}, "version gemv is not supported, only gemm"),
    ],
)
def test_refused_configs(tmp_path, changes, message):
    tensors, _ = quantized_tensors(Variant())
    write_tensors(tmp_path, tensors, {**CONFIG, "quantization_config": {**Variant().config, **changes}})
    with pytest.raises(QwenVLError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {message}")


W1 = "transformer.h.0.mlp.w1"


# `without` and `with_value` return functions that damage the dict of tensors; `not_quantized` and the two functions
# after it are such functions.


def without(suffix):
    return lambda tensors: tensors.pop(f"{W1}.{suffix}")


def with_value(suffix, change):
    def damage(tensors):
        name = f"{W1}.{suffix}"
        tensors[name] = change(tensors[name])

    return damage


def set_first(value):
    def change(values):
        values = values.copy()
        values.ravel()[0] = value
        return values

    return change


def not_quantized(tensors):
    for suffix in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        tensors.pop(f"{W1}.{suffix}")
    tensors[f"{W1}.weight"] = np.zeros([192, 256], np.float16)


def quantized_lm_head(tensors):
    tensors["lm_head.qweight"] = np.zeros([32, 64], np.int32)


def quantized_vision(tensors):
    tensors["transformer.visual.transformer.resblocks.0.mlp.c_fc.qweight"] = np.zeros([2, 32], np.int32)


BLOCKS = "is quantized; only linear layers of the language model's blocks may be"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("qweight"), "tensor h.0.mlp.w1.qweight is missing"),
        (without("qzeros"), "tensor h.0.mlp.w1.qzeros is missing"),
        (without("scales"), "tensor h.0.mlp.w1.scales is missing"),
        (without("g_idx"), "tensor h.0.mlp.w1.g_idx is missing"),
        (
            with_value("qweight", lambda value: value[:-1]),
            f"tensor {W1}.qweight has shape [31, 192], config.json requires [32, 192]",
        ),
        (with_value("scales", lambda value: value[:4]), f"tensor {W1}.scales has shape [4, 192], "),
        (
            with_value("qweight", lambda value: value.astype(np.float32)),
            f"tensor {W1}.qweight has dtype float32, it must be int32",
        ),
        (
            with_value("scales", lambda value: value.astype(np.int32)),
            f"tensor {W1}.scales has dtype int32, it must be float16 or bfloat16 or float32",
        ),
        (
            with_value("scales", set_first(np.inf)),
            f"tensor {W1}.scales holds scales that are not finite numbers of float16",
        ),
        (
            with_value("scales", lambda value: np.full(value.shape, 0.1, np.float32)),
            f"tensor {W1}.scales holds scales that are not finite numbers of float16",
        ),
        (
            with_value("g_idx", set_first(8)),
            f"{W1}.g_idx: not 8 groups of 32 inputs; copy the checkpoint again",
        ),
        (with_value("g_idx", set_first(-1)), f"{W1}.g_idx: not 8 groups of 32 inputs"),
        (with_value("g_idx", lambda value: value * 0), f"{W1}.g_idx: not 8 groups of 32 inputs"),
        (
            with_value("bias", set_first(1)),
            f"tensor {W1}.bias is not zero; the model has no such bias, and none is exported",
        ),
        (
            not_quantized,
            f"tensor {W1}.weight is not quantized; quantize all linear layers of the blocks, or none",
        ),
        (quantized_lm_head, f"tensor lm_head.qweight {BLOCKS}"),
        (quantized_vision, f"tensor transformer.visual.transformer.resblocks.0.mlp.c_fc.qweight {BLOCKS}"),
        (
            lambda tensors: tensors.update({"transformer.wte.weight": np.zeros([64, 256], np.int32)}),
            "/model.safetensors: transformer.wte.weight has dtype int32, a weight must be ",
        ),
    ],
)
def test_refused_tensors(tmp_path, damage, message):
    variant = Variant(act_order=True)
    tensors, _ = quantized_tensors(variant)
    damage(tensors)
    write_tensors(tmp_path, tensors, {**CONFIG, "quantization_config": variant.config})
    with pytest.raises(QwenVLError) as caught:
        Checkpoint(tmp_path).quantized.read("h.0.mlp.w1.weight")
    separator = "" if message.startswith("/") else ": "  # a message about a file continues the folder's path
    assert str(caught.value).startswith(f"{tmp_path}{separator}{message}")


def test_integers_without_a_config_are_refused(tmp_path):
    tensors, _ = quantized_tensors(Variant())
    write_tensors(tmp_path, tensors, CONFIG)
    with pytest.raises(
        QwenVLError, match=r"holds quantized tensors, but config\.json has no quantization_config$"
    ):
        Checkpoint(tmp_path)


def test_a_config_without_quantized_tensors_is_refused(tmp_path):
    _, dense = quantized_tensors(Variant())
    write_tensors(tmp_path, dense, {**CONFIG, "quantization_config": Variant().config})
    with pytest.raises(
        QwenVLError, match=r"no tensor is quantized, though config\.json has quantization_config"
    ):
        Checkpoint(tmp_path)


def test_values_of_quantized_weights_are_not_read_as_floats(tmp_path):
    write_quantized(tmp_path, Variant())
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(
        UsageError,
        match=r"its weights are quantized \(gptq_int4_g32\); only export-language and convert read them",
    ):
        next(checkpoint.tensors(checkpoint.language, "float32"))
