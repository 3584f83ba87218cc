"""Create a tiny untrained model: the real architecture with small sizes and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, parse_config
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs
from paddlemix_qwenvl_plugin.processing.tokenizer import QwenTokenizer
from paddlemix_qwenvl_plugin.tiny.vocab import write_tiny_vocabulary
from paddlemix_qwenvl_plugin.util.errors import QwenVLError
from paddlemix_qwenvl_plugin.util.files import new_folder


def make_tiny(folder: Path, seed: int = 0) -> None:
    """Write config.json, model.safetensors (float32) and qwen.tiktoken into a new folder; reproducible by `seed`.

    Raises:
        UsageError: the folder exists or cannot be created.
        QwenVLError: the weights cannot be written.
    """
    with new_folder(folder) as partial:
        try:
            _write(partial, seed)
        except SafetensorError as error:
            raise QwenVLError(f"{folder}: cannot be written ({error})") from error


def _write(folder: Path, seed: int) -> None:
    write_tiny_vocabulary(folder / "qwen.tiktoken")
    tokenizer = QwenTokenizer.from_folder(folder)
    config = tiny_config(tokenizer.n_vocab, tokenizer.img_start_id)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    weights = random_weights(parse_config(config, "tiny model"), seed)
    save_file(weights, str(folder / "model.safetensors"), {"format": "pd"})  # pd: Paddle


def random_weights(sizes: ModelConfig, seed: int) -> dict[str, NDArray[np.float32]]:
    """Random weights of a model of these sizes, with PaddleMIX's tensor names."""
    random = np.random.default_rng(seed)
    return {
        SCHEMES["paddlemix"].name(name): _random(name, spec, random)
        for name, spec in {**language_specs(sizes), **vision_specs(sizes)}.items()
    }


def tiny_config(n_vocab: int, image_start_id: int) -> dict[str, Any]:
    """Contents of the tiny model's config.json for a vocabulary of this size."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 64,
        "intermediate_size": 1024,
        "vocab_size": -(-n_vocab // 64) * 64,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "rotary_emb_base": 10000,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "visual": {
            "image_size": 448,
            "patch_size": 14,
            "width": 64,
            "layers": 2,
            "heads": 4,
            "mlp_ratio": 4.0,
            "output_dim": 256,
            "image_start_id": image_start_id,
        },
    }


def _random(name: str, spec: TensorSpec, random: np.random.Generator) -> NDArray[np.float32]:
    """Random tensor: norm weights near 1, biases near 0, matrices with variance 1 / inputs to preserve the scale."""
    if len(spec.shape) == 1:
        centre = 1.0 if name.endswith(".weight") else 0.0
        return np.asarray(centre + 0.1 * random.standard_normal(spec.shape), np.float32)
    inputs = spec.shape[0] if spec.linear else int(np.prod(spec.shape[1:]))
    return np.asarray(random.standard_normal(spec.shape) / np.sqrt(inputs), np.float32)
