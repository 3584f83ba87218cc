"""Model folders: three naming schemes, two layouts of linear weights, two file formats, one file or several shards.

Also weights split into tensor-parallel ranks.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
from safetensors.numpy import save_file

# Weights of linear layers, by PaddleMIX's names: [in, out] there, [out, in] in Hugging Face's checkpoints.
LINEAR = re.compile(
    r"(c_attn|c_proj|w1|w2|c_fc|in_proj|out_proj|kv_proj|lm_head)\.weight$|attn_pool\.attn\.in_proj_weight$"
)


def rename(name: str, scheme: str) -> str:
    """Translate PaddleMIX's name of a tensor to a naming scheme: "paddlemix", "static" or "huggingface"."""
    if scheme == "paddlemix":
        return name
    if scheme == "static":
        return name.replace("transformer.llm.", "qwen.")
    if name.startswith("visual."):
        return "transformer." + name.replace("visual.vit.", "visual.")
    return name.replace("transformer.llm.", "transformer.")


def renamed(weights: dict[str, np.ndarray], scheme: str, transpose: bool) -> dict[str, np.ndarray]:
    """Weights with the names of a scheme, from PaddleMIX's; with `transpose`, linear weights are [out, in]."""
    return {
        rename(name, scheme): np.ascontiguousarray(value.T) if transpose and LINEAR.search(name) else value
        for name, value in weights.items()
    }


def split_into_ranks(weights: dict[str, np.ndarray], n_ranks: int) -> list[dict[str, np.ndarray]]:
    """Split PaddleMIX's weights between ranks, as PaddleNLP does for tensor parallelism (`split_or_merge_func`)."""
    ranks: list[dict[str, np.ndarray]] = [{} for _ in range(n_ranks)]
    for name, value in weights.items():
        key = re.sub(r"\.h\.\d+\.", ".", name)  # without the number of the layer
        columns = ("lm_head.weight", "transformer.llm.mlp.w1.weight", "transformer.llm.mlp.w2.weight")
        rows = ("wte.weight", "mlp.c_proj.weight", "attn.c_proj.weight")
        if key.startswith("transformer.llm.attn.c_attn."):
            # Queries, keys and values, each in one block per rank; for two ranks: q1 q2 k1 k2 v1 v2.
            blocks = np.split(value, 3 * n_ranks, axis=-1)
            parts = [np.concatenate(blocks[rank::n_ranks], axis=-1) for rank in range(n_ranks)]
        elif key in columns:
            parts = np.split(value, n_ranks, axis=-1)
        elif key in tuple(f"transformer.llm.{row}" for row in rows):
            parts = np.split(value, n_ranks, axis=0)
        else:
            parts = [value] * n_ranks
        for rank, part in zip(ranks, parts):
            rank[name] = np.ascontiguousarray(part)
    return ranks


def write(folder: Path, config: Path, weights: dict[str, np.ndarray], kind: str) -> Path:
    """Write a model folder; kind: safetensors, pdparams, sharded-safetensors or sharded-pdparams."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, folder / "config.json")
    name = "model.safetensors" if "safetensors" in kind else "model_state.pdparams"
    if not kind.startswith("sharded"):
        _write_file(folder / name, weights)
        return folder
    # Three shards and their index.
    stem, extension = name.rsplit(".", 1)
    weight_map = {}
    for i in range(3):
        shard = {key: weights[key] for key in list(weights)[i::3]}
        file = f"{stem}-{i + 1:05d}-of-00003.{extension}"
        _write_file(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write_file(path: Path, weights: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, str(path))
    else:
        paddle.save({name: paddle.to_tensor(value) for name, value in weights.items()}, str(path))
