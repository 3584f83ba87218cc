"""Make the adapters of this folder that PaddleNLP writes, and samples of the weights that PaddleNLP merges from them.

    PYTHONPATH=. python tests/golden/lora/make_paddlenlp.py

Needs paddlenlp, in an environment of docs/upstream.md. Made with paddlenlp 3.0.0b4. The names are those of PaddleMIX's
model class, the targets of the adapter `paddlenlp` those of PaddleMIX's lora_sft_argument.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from lora_base import config, random, sample, weights
from paddlenlp.peft import LoRAConfig, LoRAModel
from paddlenlp.transformers import PretrainedConfig

from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs

HERE = Path(__file__).resolve().parent
SPECS: dict[str, TensorSpec] = {**language_specs(config()), **vision_specs(config())}

# Function from a canonical name to PaddleMIX's name.
paddlemix_name = SCHEMES["paddlemix"].name

TARGETS = [".*attn.c_attn.*", ".*attn.c_proj.*", ".*mlp.w1.*", ".*mlp.w2.*"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "paddlenlp": {"r": 4, "lora_alpha": 16, "target_modules": TARGETS},
    "paddlenlp_rslora": {
        "r": 3,
        "lora_alpha": 6,
        "rslora": True,
        "target_modules": [".*mlp.c_proj.*", ".*attn.in_proj.*", "lm_head"],
        "trainable_modules": [".*ln_f.*", ".*attn.out_proj.*"],
        "trainable_bias": "lora",
    },
}


class Model(paddle.nn.Layer):
    """A tree of layers with PaddleMIX's names and no forward pass."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        for name, spec in SPECS.items():
            *path, leaf_name, attribute = paddlemix_name(name).split(".")
            parent: paddle.nn.Layer = self
            for layer_name in path:
                if layer_name not in parent._sub_layers:
                    parent.add_sublayer(layer_name, paddle.nn.Layer())
                parent = parent._sub_layers[layer_name]
            if leaf_name not in parent._sub_layers:
                parent.add_sublayer(leaf_name, make_leaf(name, spec))
            leaf = parent._sub_layers[leaf_name]
            if attribute not in leaf._parameters:
                leaf.add_parameter(attribute, leaf.create_parameter(list(spec.shape)))
            leaf._parameters[attribute].set_value(values[name])

    def forward(self, *_: Any) -> None:
        raise NotImplementedError


def make_leaf(name: str, spec: TensorSpec) -> paddle.nn.Layer:
    """A linear layer for the weight of one, so that PaddleNLP adapts it; an empty layer for any other tensor."""
    if spec.linear and name.endswith(".weight"):
        bias = None if name.replace(".weight", ".bias") in SPECS else False
        return paddle.nn.Linear(*spec.shape, bias_attr=bias)
    return paddle.nn.Layer()


def main() -> None:
    for adapter, settings in ADAPTERS.items():
        folder = HERE / adapter
        shutil.rmtree(folder, ignore_errors=True)
        model = LoRAModel(Model(weights()), LoRAConfig(**settings))
        model.mark_only_lora_as_trainable()
        for name, parameter in model.model.state_dict().items():
            if not parameter.stop_gradient:
                parameter.set_value(random(f"{adapter} {name}", *parameter.shape))
        model.save_pretrained(folder, save_model_config=False)
        model.merge()
        merged = {name: value.numpy() for name, value in model.model.state_dict().items()}
        base = weights()
        samples = {
            name: sample(name, merged[paddlemix_name(name)])
            for name in SPECS
            if not np.array_equal(merged[paddlemix_name(name)], base[name])
        }
        np.savez_compressed(folder / "merged.npz", **samples)
        print(adapter, sorted(samples))


if __name__ == "__main__":
    main()
