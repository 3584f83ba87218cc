"""The shards of a model folder: discovery, index of tensors, and reading one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import pdparams_file, safetensors_file, torch_file
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# (file or index, kind), in the order of preference if a folder has several.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("model_state.pdparams.index.json", "pdparams"),
    ("model_state.pdparams", "pdparams"),
    ("pytorch_model.bin.index.json", "bin"),
    ("pytorch_model.bin", "bin"),
)
# Modules that read a kind of file tensor by tensor.
_BY_TENSOR: dict[str, Any] = {"safetensors": safetensors_file, "bin": torch_file}


@dataclass(frozen=True)
class Stored:
    """Shape and dtype of a tensor in its shard; `dtype` is float32, float16, bfloat16 or float64."""

    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The shards of one folder.

    `tensors` maps every stored name to its shape and dtype. safetensors and PyTorch files are read tensor by tensor; a
    .pdparams file can only be read as a whole, so at most one is in memory.
    """

    def __init__(self, files: list[Path], kind: str, index: dict[str, str] | None) -> None:
        self.files = files
        self.kind = kind
        self._loaded: tuple[Path, dict[str, NDArray[np.generic]]] | None = None
        self._headers: dict[Path, dict[str, Any]] = {}
        self._where: dict[str, Path] = {}
        self.tensors: dict[str, Stored] = {}
        for path in files:
            for name, stored in self._list(path).items():
                if name in self._where:
                    raise QwenVLError(f"{path}: tensor {name} is also in {self._where[name].name}")
                self._where[name] = path
                self.tensors[name] = stored
        for name, file_name in (index or {}).items():
            if self._where.get(name) is None or self._where[name].name != file_name:
                raise QwenVLError(
                    f"{files[0].parent}: the index lists {name} in {file_name}, which does not contain it"
                )

    @classmethod
    def open(cls, folder: Path, weight_files: Sequence[tuple[str, str]] = WEIGHT_FILES) -> Shards:
        """Find and index the weight files of a folder, the first of `weight_files` that exists.

        Raises:
            UsageError: the folder has no weight file with a known name.
            QwenVLError: a file of the index is missing, or a file is damaged.
        """
        for name, kind in weight_files:
            path = folder / name
            if not path.is_file():
                continue
            if not name.endswith(".index.json"):
                return cls([path], kind, None)
            index = read_index(path)
            files = [folder / file_name for file_name in sorted(set(index.values()))]
            for file in files:
                if not file.is_file():
                    raise QwenVLError(f"{file}: missing, though {name} names it; copy the folder again")
            return cls(files, kind, index)
        names = ", ".join(name for name, _ in weight_files)
        raise UsageError(f"{folder}: no weights in it (looked for {names})")

    def read(self, names: set[str]) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield the named tensors in storage type, shard by shard."""
        for path in self.files:
            selected = [name for name in self.tensors if name in names and self._where[name] == path]
            if self.kind in _BY_TENSOR:
                for name in selected:
                    yield name, _BY_TENSOR[self.kind].read_tensor(path, self._headers[path][name])
            elif selected:
                tensors = self._load(path)
                for name in selected:
                    yield name, tensors[name]

    def _list(self, path: Path) -> dict[str, Stored]:
        if self.kind in _BY_TENSOR:
            header = self._headers[path] = _BY_TENSOR[self.kind].read_header(path)
            return {name: Stored(entry.shape, entry.dtype) for name, entry in header.items()}
        return {
            name: Stored(array.shape, _dtype_name(array, name, path))
            for name, array in self._load(path).items()
        }

    def _load(self, path: Path) -> dict[str, NDArray[np.generic]]:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None  # free the memory before the next file is read
            self._loaded = (path, pdparams_file.read(path))
        return self._loaded[1]


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name -> file name.

    Raises:
        QwenVLError: not an index, or a file outside the folder.
    """
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QwenVLError(
            f"{path}: not a weight index, a JSON object with 'weight_map'; copy it again"
        ) from error
    if not index:
        raise QwenVLError(f"{path}: the index names no tensor")
    for file in index.values():
        if Path(file).name != file:
            raise QwenVLError(f"{path}: the index names a file outside its folder: {file}")
    return index


def _dtype_name(array: NDArray[np.generic], name: str, path: Path) -> str:
    if array.dtype == np.uint16:  # Paddle's NumPy form of bfloat16
        return "bfloat16"
    if array.dtype.kind != "f":
        raise QwenVLError(f"{path}: {name} has dtype {array.dtype}, a weight must be a floating-point tensor")
    return str(array.dtype.name)
