"""Make the folders beside this file: a small language model with random weights, quantized and stored by other tools.

    python make.py auto_gptq auto_awq act_order

Run by hand; tests read the folders by copy_tool_folder() of tests/quantized_folders.py.

| folder | tool | storage |
| --- | --- | --- |
| auto_gptq | auto-round 0.16.1, rounding to nearest | GPTQ, 4 bits, groups of 32, asymmetric, safetensors |
| auto_awq | auto-round 0.16.1, rounding to nearest | AWQ, 4 bits, groups of 32, asymmetric, safetensors |
| act_order | AutoGPTQ 0.7.1, GPTQ with `desc_act` | GPTQ, 4 bits, groups of 32, symmetric, a bias in each layer, .bin |

In each folder, reference.npz has float32 results of the model with the tool's linear layers (auto_awq: with the weights
that the tool dequantizes): `logits` [T, vocabulary] for `tokens` [T], and, under the name of a layer, its output for
`inputs(…)`.

AutoGPTQ is installed by `pip install --no-deps --no-build-isolation auto-gptq`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import PretrainedConfig, PreTrainedModel

HERE = Path(__file__).parent
HIDDEN, HEADS, MLP, VOCAB = 128, 2, 64, 40
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "kv_channels": HIDDEN // HEADS,
    "intermediate_size": 2 * MLP,
    "vocab_size": VOCAB,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 512,
    "max_position_embeddings": 1024,
    "model_type": "qwen",
    "visual": {
        "image_size": 56,
        "patch_size": 14,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": HIDDEN,
        "n_queries": 16,
        "image_start_id": 30,
    },
}


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, tokens, head size], base 10000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """A transformer block of Qwen with Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.RMSNorm(HIDDEN, 1e-6), nn.RMSNorm(HIDDEN, 1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.attn.c_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp.w1 = nn.Linear(HIDDEN, MLP, bias=False)
        self.mlp.w2 = nn.Linear(HIDDEN, MLP, bias=False)
        self.mlp.c_proj = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        batch, n, _ = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(batch, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.attn.c_proj(attention.transpose(1, 2).reshape(batch, n, HIDDEN))
        y = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(y) * silu(self.mlp.w2(y)))


class Model(PreTrainedModel):
    """Qwen's language model."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(VOCAB, HIDDEN)
        self.transformer.h = nn.ModuleList([Block()])
        self.transformer.ln_f = nn.RMSNorm(HIDDEN, 1e-6)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.transformer.wte(input_ids)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def make_model() -> Model:
    """The model before quantization: float32 parameters, whose values are exact in float16."""
    torch.manual_seed(7)
    model = Model(PretrainedConfig(**CONFIG))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
        else:
            # Rows have different means, so that their zero points differ.
            parameter.data = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
            parameter.data += 0.05 * torch.randn(parameter.shape[0], 1)
        parameter.data = parameter.data.half().float()
    return model


def inputs(n_in: int) -> np.ndarray:
    """Random inputs of a layer, float32 [3, n_in]."""
    return np.random.RandomState(n_in).randn(3, n_in).astype("float32")


def write_reference(folder: Path, quantized: Model) -> None:
    """Write reference.npz, given the model with the tool's layers or dequantized weights."""
    torch.manual_seed(11)
    tokens = torch.randint(0, 30, [24])  # text tokens: the image tags begin at 30
    figures = {"tokens": tokens.numpy()}
    with torch.no_grad():
        for name in LINEAR:
            layer = quantized.transformer.h[0].get_submodule(name)
            x = torch.from_numpy(inputs(MLP if name == "mlp.c_proj" else HIDDEN))
            figures[name] = layer(x[None])[0].float().numpy()
        figures["logits"] = quantized(tokens[None])[0].float().numpy()
    np.savez_compressed(folder / "reference.npz", **figures)


def write_config(folder: Path, quantization: dict[str, Any]) -> None:
    (folder / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": quantization}, indent=1) + "\n"
    )


def make_by_auto_round(form: str) -> None:
    """Make the folder auto_gptq or auto_awq, which are names of auto-round's formats."""
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    from safetensors.torch import load_file, save_file

    folder, scratch = HERE / form, HERE / f"{form}.tmp"
    tool = AutoRound(
        make_model(), tokenizer=object(), bits=4, group_size=32, sym=False, iters=0, disable_opt_rtn=True
    )
    tool.quantize_and_save(str(scratch), format=form)
    [written] = scratch.glob("*/model.safetensors")
    folder.mkdir(exist_ok=True)
    write_config(folder, json.loads(written.with_name("config.json").read_text())["quantization_config"])
    tensors = load_file(written)
    # The tool stores tensors other than int32 in float32. Here they become float16, as in published checkpoints.
    save_file(
        {name: value if value.dtype == torch.int32 else value.half() for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    shutil.rmtree(scratch)
    quantized = make_model()
    for name in LINEAR:
        packed = {
            suffix: tensors[f"transformer.h.0.{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")
        }
        layer = quantized.transformer.h[0].get_submodule(name)
        if form == "auto_awq":
            # Dequantized to float32, because the tool's own layer computes in float16.
            weight = dequantize_gemm(packed["qweight"], packed["qzeros"], packed["scales"].float(), 4, 32)
            layer.weight.data = weight.T.contiguous()
        else:
            # Without g_idx: with it, the tool's layer computes at most as many outputs as it has inputs.
            tool_layer = QuantLinear(4, 32, layer.in_features, layer.out_features, layer.bias is not None)
            tool_layer.load_state_dict(packed, strict=False)
            tool_layer.scales = tool_layer.scales.float()
            if layer.bias is not None:
                tool_layer.bias = tensors[f"transformer.h.0.{name}.bias"].float()
            parent_name, _, layer_name = name.rpartition(".")
            setattr(quantized.transformer.h[0].get_submodule(parent_name), layer_name, tool_layer)
        if form == "auto_awq" and layer.bias is not None:
            layer.bias.data = tensors[f"transformer.h.0.{name}.bias"].float()
    write_reference(folder, quantized)


def make_by_auto_gptq() -> None:
    """Make the folder act_order."""
    # Only two modules of auto_gptq are needed. Its packages are replaced by empty ones, because their __init__ imports
    # models that newer versions of transformers do not have.
    import importlib.util

    root = Path(importlib.util.find_spec("auto_gptq").submodule_search_locations[0])  # type: ignore[union-attr,index]
    for name in (
        "auto_gptq",
        "auto_gptq.quantization",
        "auto_gptq.nn_modules",
        "auto_gptq.nn_modules.qlinear",
    ):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
    from auto_gptq.quantization.gptq import GPTQ

    torch.cuda.synchronize = lambda *_: None  # the tool calls it without a GPU, too
    folder = HERE / "act_order"
    folder.mkdir(exist_ok=True)
    quantized, original = make_model(), make_model()
    state_dict = {name: value.half() for name, value in original.state_dict().items()}
    for name in LINEAR:
        layer = original.transformer.h[0].get_submodule(name)
        gptq = GPTQ(layer)
        gptq.quantizer.configure(4, perchannel=True, sym=True, mse=False)
        # Inputs of different magnitudes, so that act-order permutes the columns.
        gptq.add_batch(torch.randn(256, layer.in_features) * (0.2 + torch.rand(layer.in_features)), None)
        scale, zero, g_idx = gptq.fasterquant(group_size=32, actorder=True)
        packed = QuantLinear(4, 32, layer.in_features, layer.out_features, True, weight_dtype=torch.float32)
        packed.pack(layer, scale.half().float(), zero, g_idx)
        if packed.bias is None or layer.bias is None:
            packed.bias = torch.zeros(layer.out_features)
        state_dict.pop(f"transformer.h.0.{name}.weight")
        for suffix in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            value = getattr(packed, suffix)
            state_dict[f"transformer.h.0.{name}.{suffix}"] = (
                value.half() if suffix in ("scales", "bias") else value
            )
        parent_name, _, layer_name = name.rpartition(".")
        setattr(quantized.transformer.h[0].get_submodule(parent_name), layer_name, packed)
    torch.save(state_dict, folder / "pytorch_model.bin")
    write_config(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True})
    write_reference(folder, quantized)


for folder_name in sys.argv[1:]:
    if folder_name == "act_order":
        make_by_auto_gptq()
    else:
        make_by_auto_round(folder_name)
