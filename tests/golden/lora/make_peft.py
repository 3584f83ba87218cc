"""Make the adapters of this folder that PEFT writes, and samples of the weights that PEFT merges from them.

    PYTHONPATH=. python tests/golden/lora/make_peft.py

Needs torch and peft, which the tests of these adapters do not need. Made with peft 0.21.2 and torch 2.13.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from lora_base import config, random, sample, weights

from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs

HERE = Path(__file__).resolve().parent
SPECS: dict[str, TensorSpec] = {**language_specs(config()), **vision_specs(config())}

# peft: the targets of Qwen-VL's finetune.py (c_attn, attn.c_proj, w1, w2), its modules_to_save for Qwen-VL (none for
# Qwen-VL-Chat), and two matrices of the vision tower.
ADAPTERS: dict[str, dict[str, Any]] = {
    "peft": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["c_attn", "attn.c_proj", "w1", "w2", "in_proj", "c_fc"],
        "modules_to_save": ["wte", "lm_head"],
        "rank_pattern": {"h.0.mlp.w1": 2},
        "alpha_pattern": {"h.0.mlp.w1": 3, "h.1.attn.c_attn": 5},
    },
    # Saved as .bin. PEFT stores the update of an embedding, wte, under other names: lora_embedding_A and _B.
    "peft_rslora": {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "target_modules": ["c_attn", "wte"],
        "bias": "lora_only",
    },
}


def hugging_face_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"transformer.{name}"


def build(values: dict[str, np.ndarray]) -> torch.nn.Module:
    """A module tree with Hugging Face's names and no forward pass."""
    model = torch.nn.Module()
    for name, spec in SPECS.items():
        *path, leaf_name, attribute = hugging_face_name(name).split(".")
        parent = model
        for module_name in path:
            if not hasattr(parent, module_name):
                parent.add_module(module_name, torch.nn.Module())
            parent = getattr(parent, module_name)
        if not hasattr(parent, leaf_name):
            parent.add_module(leaf_name, make_leaf(name, spec))
        torch_values = values[name].T if spec.linear else values[name]
        with torch.no_grad():
            parameter = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(torch_values)))
            setattr(getattr(parent, leaf_name), attribute, parameter)
    return model


def make_leaf(name: str, spec: TensorSpec) -> torch.nn.Module:
    """A linear layer or an embedding for the weight of one, so that PEFT adapts it; otherwise an empty module."""
    if name == "wte.weight":
        return torch.nn.Embedding(*spec.shape)
    if spec.linear and name.endswith(".weight"):
        return torch.nn.Linear(*spec.shape, bias=name.replace(".weight", ".bias") in SPECS)
    return torch.nn.Module()


def main() -> None:
    for adapter, settings in ADAPTERS.items():
        folder = HERE / adapter
        shutil.rmtree(folder, ignore_errors=True)
        model = peft.get_peft_model(build(weights()), peft.LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.from_numpy(random(f"{adapter} {name}", *parameter.shape)))
        if adapter == "peft":
            model.save_pretrained(folder)
        else:
            folder.mkdir()
            model.peft_config["default"].save_pretrained(folder)
            torch.save(peft.get_peft_model_state_dict(model), folder / "adapter_model.bin")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card
        merged = {name: value.numpy() for name, value in model.merge_and_unload().state_dict().items()}
        base = weights()
        samples = {}
        for name, spec in SPECS.items():
            values = merged[hugging_face_name(name)]
            values = values.T if spec.linear else values
            if not np.array_equal(values, base[name]):
                samples[name] = sample(name, values)
        np.savez_compressed(folder / "merged.npz", **samples)
        print(adapter, sorted(samples))


if __name__ == "__main__":
    main()
