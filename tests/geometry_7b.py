"""Model folders with random weights, for tests and benchmarks; CONFIG has the layer sizes of the real 7B model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.config import parse_config
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs

# One layer of the language model and one of the vision tower.
CONFIG: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 1,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def write_model(folder: Path, sizes: dict[str, Any], dtype: str) -> Path:
    """Write a safetensors folder with Hugging Face's names and [out, in] layout, with one shard in memory at a time."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    config = parse_config(sizes, "test")
    # A repeated pattern: generating gigabytes of random numbers would take longer than the test. Its length is prime,
    # so rows of a matrix differ.
    pattern = np.random.default_rng(0).standard_normal(1048573).astype(np.float32)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards({**language_specs(config), **vision_specs(config)})):
        shard = {
            name if name == "lm_head.weight" else f"transformer.{name}": values(pattern, name, spec, dtype)
            for name, spec in specs.items()
        }
        file = f"model-{number:05d}.safetensors"
        safetensors_file.write(folder / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_gptq(folder: Path, sizes: dict[str, Any], group: int = 128) -> Path:
    """Write a 4-bit GPTQ folder with random integers and random groups (act-order).

    Each layer of the language model is a shard.
    """
    folder.mkdir(exist_ok=True)
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True}
    (folder / "config.json").write_text(json.dumps({**sizes, "quantization_config": quantization}))
    config, rng = parse_config(sizes, "test"), np.random.default_rng(0)
    weight_map: dict[str, str] = {}

    def layer_of(item: tuple[str, TensorSpec]) -> str:
        # The first two parts of the tensor's name, such as "h.0".
        return ".".join(item[0].split(".")[:2])

    specs = sorted({**language_specs(config), **vision_specs(config)}.items(), key=layer_of)
    for number, (_, group_specs) in enumerate(groupby(specs, key=layer_of)):
        shard = dict(gptq_tensors(group_specs, group, rng))
        save_file(shard, str(folder / f"model-{number:05d}.safetensors"))
        weight_map.update(dict.fromkeys(shard, f"model-{number:05d}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def gptq_tensors(
    specs: Iterable[tuple[str, TensorSpec]], group: int, rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield GPTQ's tensors in place of the language layers' linear weights, and the other tensors in float16."""
    for name, spec in specs:
        stored = name if name == "lm_head.weight" else f"transformer.{name}"
        if not spec.linear or not name.startswith("h."):
            shape = spec.shape[::-1] if spec.linear else spec.shape
            yield stored, np.full(shape, 0.01, np.float16)
            continue
        n_in, n_out = spec.shape
        layer, groups = stored[: -len(".weight")], n_in // group
        yield f"{layer}.qweight", rng.integers(-(2**31), 2**31, [n_in // 8, n_out], np.int32)
        # Zero points of 8, stored as 7: GPTQ subtracts 1.
        yield f"{layer}.qzeros", np.full([groups, n_out // 8], 0x77777777, np.int32)
        yield f"{layer}.scales", np.full([groups, n_out], 0.1 / n_in**0.5, np.float16)
        yield f"{layer}.g_idx", rng.permutation(n_in).astype(np.int32) // group


def shards(specs: dict[str, TensorSpec]) -> Iterator[dict[str, TensorSpec]]:
    """Split the specs into shards of at most 12 tensors."""
    names = list(specs)
    for first in range(0, len(names), 12):
        yield {name: specs[name] for name in names[first : first + 12]}


def values(pattern: NDArray[np.float32], name: str, spec: TensorSpec, dtype: str) -> NDArray[np.generic]:
    """Values of a tensor: variance 1 for wte.weight and vectors, else 0.25 / n_in, to keep activations small.

    n_in: the number of inputs of a linear layer, the last dimension of any other tensor.
    """
    shape = spec.shape[::-1] if spec.linear else spec.shape
    n_in = spec.shape[0] if spec.linear else shape[-1]
    scale = 1.0 if len(shape) == 1 or name == "wte.weight" else 0.5 / np.sqrt(n_in)
    return np.resize(cast(pattern * np.float32(scale), "float32", dtype, name), shape)
