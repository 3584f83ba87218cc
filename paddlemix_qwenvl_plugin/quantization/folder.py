"""Writer of a GPTQ model folder: one shard per decoder layer, shards of the other tensors, index and config.

Tensor names are Hugging Face's. The format is AutoGPTQ's "gptq", which Transformers, GPTQModel and others load.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import safetensors_file
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import read_json
from paddlemix_qwenvl_plugin.checkpoint.convert import MAX_SHARD_BYTES, other_files
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.checkpoint.tensor_parallel import TENSOR_PARALLEL_KEYS
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.quantization.rounding import DAMPING
from paddlemix_qwenvl_plugin.util.files import write_beside

_SCHEME = SCHEMES["huggingface"]
INDEX = "model.safetensors.index.json"
# Suffix of a quantized matrix's tensor (packing.py) -> storage type.
_PACKED = {"qweight": "int32", "qzeros": "int32", "g_idx": "int32", "scales": "float16"}

Tensors = dict[str, NDArray[np.generic]]


class GptqFolder:
    """Writer of a GPTQ model folder. Each shard is written atomically: a resumed job (job.py) keeps earlier layers."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        # Storage type of the tensors that are not quantized: that of the checkpoint, but float32 for float64.
        self.dtype = checkpoint.dtype if checkpoint.dtype in STORAGE else "float32"
        self._other_shards = list(_split(self._other_specs(), self.dtype))

    def write_layer(self, index: int, tensors: Tensors) -> None:
        """Write the shard of decoder layer `index`, from tensors by canonical name."""
        self._write(index, tensors)

    def finish(self, bits: int, group: int) -> None:
        """Write the other tensors, the index and the config; copy the model's files other than weights."""
        layers = self._checkpoint.config.num_hidden_layers
        for number, specs in enumerate(self._other_shards, start=layers):
            self._write(number, dict(self._checkpoint.tensors(specs, self.dtype, out_in=True)))
        for path in other_files(self._checkpoint.folder):
            if path.name != "config.json":
                shutil.copyfile(path, self._folder / path.name)
        config = read_json(self._checkpoint.folder / "config.json")
        for key in TENSOR_PARALLEL_KEYS:  # the weights are not split over ranks here
            config.pop(key, None)
        config["quantization_config"] = quantization_config(bits, group)
        _write_json(self._folder / "config.json", config)
        weight_map: dict[str, str] = {}
        total = 0
        # From the files, because an earlier process may have written some of them.
        for number in range(layers + len(self._other_shards)):
            file = self._shard(number)
            for name, entry in safetensors_file.read_header(self._folder / file).items():
                weight_map[name] = file
                total += entry.n_bytes
        _write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    @property
    def n_bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))

    @property
    def n_bytes_unquantized(self) -> int:
        """Size of all tensors in bytes if none were quantized: all in `dtype`."""
        specs = {**self._checkpoint.language, **self._checkpoint.vision}
        return sum(math.prod(spec.shape) for spec in specs.values()) * STORAGE[self.dtype].itemsize

    def _write(self, number: int, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        named = {_SCHEME.name(name): values for name, values in tensors.items()}
        dtypes = {name: _PACKED.get(name.rsplit(".", 1)[-1], self.dtype) for name in named}
        write = partial(safetensors_file.write, tensors=named, dtype=dtypes, framework=_SCHEME.format)
        write_beside(self._folder / self._shard(number), write)

    def _shard(self, number: int) -> str:
        count = self._checkpoint.config.num_hidden_layers + len(self._other_shards)
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _other_specs(self) -> dict[str, TensorSpec]:
        specs = {**self._checkpoint.language, **self._checkpoint.vision}
        return {name: spec for name, spec in specs.items() if not name.startswith("h.")}


def quantization_config(bits: int, group: int) -> dict[str, Any]:
    """Value of the key `quantization_config` in config.json."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": False,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": DAMPING,
    }


def _split(specs: dict[str, TensorSpec], dtype: str) -> Iterator[dict[str, TensorSpec]]:
    """Split tensors into shards of at most MAX_SHARD_BYTES; a larger tensor gets a separate shard."""
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in specs.items():
        n_bytes = math.prod(spec.shape) * STORAGE[dtype].itemsize
        if shard and size + n_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += n_bytes
    yield shard


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
