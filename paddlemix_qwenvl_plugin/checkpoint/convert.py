"""Rewrite a model folder as sharded safetensors with PaddleMIX's names, streaming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import new_folder

MAX_SHARD_BYTES = 2 * 1024**3
_WEIGHT_SUFFIXES = (".safetensors", ".pdparams", ".bin", ".index.json", ".pdiparams", ".pdmodel")


def convert(
    source: Path, target: Path, dtype: Optional[str] = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the model of `source` into the new folder `target`; tokenizer and config files come along.

    The folder appears under its name only when it is whole.

    Args:
        source: a model folder in any supported form.
        target: must not exist yet.
        dtype: float32, float16 or bfloat16; None keeps what the token embedding has.
        max_shard_bytes: size of a weight file; a tensor larger than this gets a file of its own.

    Raises:
        UsageError: `target` exists. QwenVLError: as Checkpoint raises.
    """
    if target.exists():
        raise UsageError(f"{target}: exists already; name a new folder")
    checkpoint = Checkpoint(source)
    if dtype is None:
        dtype = checkpoint.dtype if checkpoint.dtype in STORAGE else "float32"
    with new_folder(target) as partial:
        _write_shards(checkpoint, partial, dtype, max_shard_bytes)
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
                shutil.copyfile(path, partial / path.name)


def paddlemix_name(name: str) -> str:
    """The name that PaddleMIX's model class gives to a canonical tensor."""
    if name == "lm_head.weight":
        return name
    if not name.startswith("visual."):
        return f"transformer.llm.{name}"
    rest = name[len("visual.") :]
    tower = ("conv1.", "positional_embedding", "ln_pre.", "transformer.")
    return f"visual.vit.{rest}" if rest.startswith(tower) else name


def _write_shards(checkpoint: Checkpoint, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    shard: dict[str, NDArray[np.generic]] = {}
    files: list[list[str]] = []
    size = total = 0
    specs = {**checkpoint.language, **checkpoint.vision}
    for name, values in checkpoint.tensors(specs, dtype):
        if shard and size + values.nbytes > max_shard_bytes:
            safetensors_file.write(folder / _temporary(len(files)), shard, dtype)
            files.append(list(shard))
            shard, size = {}, 0
        shard[paddlemix_name(name)] = values
        size += values.nbytes
        total += values.nbytes
    safetensors_file.write(folder / _temporary(len(files)), shard, dtype)
    files.append(list(shard))
    weight_map = {}
    for i, names in enumerate(files):
        final = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _temporary(i)).replace(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _temporary(number: int) -> str:
    return f"model-{number + 1:05d}.safetensors"
