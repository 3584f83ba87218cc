"""The base model of the adapters in this folder, small and with random weights; used by the tests and make_*.py."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, parse_config
from paddlemix_qwenvl_plugin.checkpoint.tensors import language_specs, vision_specs

CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 64,
    "intermediate_size": 128,
    "vocab_size": 40,
    "visual": {
        "image_size": 28,
        "patch_size": 14,
        "width": 32,
        "layers": 1,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 128,
        "n_queries": 4,
        "image_start_id": 30,
    },
}


def config() -> ModelConfig:
    """The sizes of the base model."""
    return parse_config(CONFIG, "base model")


def random(name: str, *shape: int) -> np.ndarray:
    """Random values of a tensor, float32, with a standard deviation of 1/8; the same for the same name and shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) / 8


def weights() -> dict[str, np.ndarray]:
    """The tensors of the base model by canonical name (checkpoint/tensors.py); linear weights are [in, out]."""
    specs = {**language_specs(config()), **vision_specs(config())}
    return {name: random(name, *spec.shape) for name, spec in specs.items()}


def sample(name: str, values: np.ndarray) -> np.ndarray:
    """64 values of a tensor at random positions, the same for the same name and size."""
    positions = np.random.default_rng(zlib.crc32(f"sample of {name}".encode())).integers(values.size, size=64)
    return np.ascontiguousarray(values).reshape(-1)[positions]
