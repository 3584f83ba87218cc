"""Convert a model folder to sharded safetensors with PaddleMIX's tensor names, one shard at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Optional

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.util.files import new_folder

MAX_SHARD_BYTES = 2 * 1024**3
_WEIGHT_SUFFIXES = (".safetensors", ".pdparams", ".bin", ".index.json", ".pdiparams", ".pdmodel")


def convert(
    source: Path, target: Path, dtype: Optional[str] = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Convert the model of `source` to the new folder `target`; tokenizer and config files are copied.

    The folder is created atomically.

    Args:
        source: a model folder in any supported form.
        target: must not exist yet.
        dtype: float32, float16 or bfloat16; None keeps the storage type of the token embedding.
        max_shard_bytes: maximum size of a shard; a larger tensor is a shard by itself.

    Raises:
        UsageError: `target` exists.
        QwenVLError: as for Checkpoint.
    """
    checkpoint = Checkpoint(source)
    if dtype is None:
        dtype = checkpoint.dtype if checkpoint.dtype in STORAGE else "float32"
    with new_folder(target) as partial:
        _write_shards(checkpoint, partial, dtype, max_shard_bytes)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(path, partial / path.name)


def paddlemix_name(name: str) -> str:
    """The name of a canonical tensor in PaddleMIX's model class."""
    if name == "lm_head.weight":
        return name
    if not name.startswith("visual."):
        return f"transformer.llm.{name}"
    rest = name[len("visual.") :]
    tower = ("conv1.", "positional_embedding", "ln_pre.", "transformer.")
    return f"visual.vit.{rest}" if rest.startswith(tower) else name


def _write_shards(checkpoint: Checkpoint, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    shards: list[dict[str, TensorSpec]] = [{}]
    size = total = 0
    for name, spec in {**checkpoint.language, **checkpoint.vision}.items():
        n_bytes = math.prod(spec.shape) * STORAGE[dtype].itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += n_bytes
        total += n_bytes
    weight_map = {}
    for number, specs in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {paddlemix_name(name): values for name, values in checkpoint.tensors(specs, dtype)}
        safetensors_file.write(folder / file, shard, dtype)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
