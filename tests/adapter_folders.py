"""LoRA adapters with random values, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.tensors import language_specs


def write_adapter(
    folder: Path, config: ModelConfig, seed: int, size: float = 0.4, rank: int = 4, dtype: str = "float32"
) -> Path:
    """Write an adapter of all linear weights of the layers.

    At rank 4 its updates of the weights have a standard deviation of about `size` / 20. With `dtype` bfloat16 the file
    holds float32 values that are exact in bfloat16.
    """
    folder.mkdir()
    random = np.random.default_rng(seed)
    tensors = {}
    for name, spec in language_specs(config).items():
        if spec.linear and name.startswith("h."):
            module = f"base_model.model.transformer.{name[: -len('.weight')]}"
            n_in, n_out = spec.shape
            tensors[f"{module}.lora_A.weight"] = random.standard_normal((rank, n_in)).astype(np.float32) * 0.1
            tensors[f"{module}.lora_B.weight"] = (
                random.standard_normal((n_out, rank)).astype(np.float32) * size / 8
            )
    if dtype == "bfloat16":
        for values in tensors.values():
            values.view(np.uint32)[...] &= 0xFFFF0000  # the upper half of a float32 is a bfloat16
    elif dtype == "float16":
        tensors = {name: values.astype(np.float16) for name, values in tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    data = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder
