"""Conversion of a model folder to sharded safetensors in any of the three naming schemes, one shard at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES, Scheme
from paddlemix_qwenvl_plugin.checkpoint.shards import Stored
from paddlemix_qwenvl_plugin.checkpoint.tensor_parallel import TENSOR_PARALLEL_KEYS
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.files import new_folder

MAX_SHARD_BYTES = 2 * 1024**3
# Ends of the names of weights in any format and their indexes, of legacy programs, and of training state.
_NOT_COPIED = (
    ".safetensors",
    ".pdparams",
    ".bin",
    ".index.json",
    ".pdiparams",
    ".pdmodel",
    ".pdopt",
    ".pt",
    ".pth",
)


def convert(
    source: Path,
    target: Path,
    dtype: Optional[str] = None,
    to: str = "paddlemix",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Convert the model of `source` to the new folder `target`, which is created atomically.

    The source's `other_files`, such as the tokenizer's, are copied, config.json without the keys of tensor parallelism.

    Args:
        source: a model folder in any supported form.
        target: must not exist yet.
        dtype: float32, float16 or bfloat16; None keeps each tensor's storage type (float32 for float64). Tensors of
            quantized layers, except the bias of c_attn, are copied unchanged.
        to: naming scheme and layout, a key of SCHEMES.
        max_shard_bytes: maximum size of a shard; a larger tensor gets a separate shard.

    Raises:
        UsageError: `target` exists, or `to` is not a scheme.
        QwenVLError: a value does not fit into float16.
        UsageError, QwenVLError: as for Checkpoint.
    """
    if to not in SCHEMES:
        raise UsageError(f"--to {to}: must be one of {', '.join(SCHEMES)}")
    checkpoint = Checkpoint(source)
    tensors = _tensors(checkpoint, dtype)
    with new_folder(target) as partial:
        _write_shards(checkpoint, partial, tensors, SCHEMES[to], max_shard_bytes)
        for path in other_files(source):
            shutil.copyfile(path, partial / path.name)
        _remove_tensor_parallel_keys(partial / "config.json")


def other_files(folder: Path) -> list[Path]:
    """List the files of a model folder that are copied to a new one: no weights, exported stages or training state."""
    # An exported stage is recognized by its PREFIX.pdiparams: its programs and manifest are PREFIX.*.json beside it.
    exports = tuple(f"{path.stem}." for path in folder.glob("*.pdiparams"))
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.endswith(_NOT_COPIED)
        and not (path.suffix == ".json" and path.name.startswith(exports))
    ]


def _tensors(checkpoint: Checkpoint, dtype: Optional[str]) -> dict[str, Stored]:
    """Shape and dtype of every tensor of the new folder, by canonical name.

    The tensors in `quantized.stored`, whose dtypes are kept, come first; then the others of the language model, then
    those of the vision stage, both in the order of the forward pass.
    """
    quantized = checkpoint.quantized
    tensors: dict[str, Stored] = dict(quantized.stored) if quantized else {}
    for name, spec in {**checkpoint.language, **checkpoint.vision}.items():
        if quantized is None or name not in quantized.names:
            kept = checkpoint.dtype_of(name)
            tensors[name] = Stored(spec.shape, dtype or (kept if kept in STORAGE else "float32"))
    return tensors


def _write_shards(
    checkpoint: Checkpoint, folder: Path, tensors: dict[str, Stored], scheme: Scheme, max_shard_bytes: int
) -> None:
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, stored in tensors.items():
        n_bytes = math.prod(stored.shape) * (STORAGE.get(stored.dtype) or np.dtype(stored.dtype)).itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
        total += n_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        dtypes = {scheme.name(name): tensors[name].dtype for name in names}
        shard = {scheme.name(name): _read(checkpoint, name, tensors[name].dtype, scheme) for name in names}
        safetensors_file.write(folder / file, shard, dtypes, scheme.format)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")


def _read(checkpoint: Checkpoint, name: str, dtype: str, scheme: Scheme) -> NDArray[np.generic]:
    specs = {**checkpoint.language, **checkpoint.vision}
    if checkpoint.quantized is not None and name in checkpoint.quantized.stored:
        return checkpoint.quantized.read_stored(name)
    [(_, values)] = checkpoint.tensors({name: specs[name]}, dtype, out_in=scheme.out_in)
    return values


def _remove_tensor_parallel_keys(config: Path) -> None:
    content = json.loads(config.read_text("utf-8"))
    if any(key in content for key in TENSOR_PARALLEL_KEYS):
        kept = {key: value for key, value in content.items() if key not in TENSOR_PARALLEL_KEYS}
        config.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
