"""The shards of a model folder: discovery, index of tensors, and reading tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import pdparams_file, safetensors_file, torch_file
from paddlemix_qwenvl_plugin.checkpoint.config import read_json
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# (weight file or index of shards, key of _READERS), in the order of preference if a folder has several.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "safetensors"),
    ("model.safetensors", "safetensors"),
    ("model_state.pdparams.index.json", "pdparams"),
    ("model_state.pdparams", "pdparams"),
    ("pytorch_model.bin.index.json", "bin"),
    ("pytorch_model.bin", "bin"),
)
_READERS: dict[str, Any] = {"safetensors": safetensors_file, "pdparams": pdparams_file, "bin": torch_file}
# File names of AutoGPTQ, such as gptq_model-4bit-128g.safetensors, for folders without any of the files above.
_AUTOGPTQ = re.compile(r"gptq_model-[48]bit-(?:-1|\d{2,4})g\.(safetensors|bin)(\.index\.json)?")
# End of the name of a shard, such as -00001-of-00010.safetensors.
_SHARD = re.compile(r"-\d+-of-\d+\.(safetensors|pdparams|bin)")


@dataclass(frozen=True)
class Stored:
    """Shape and storage type (float32, bfloat16, int32, …) of a tensor in its shard."""

    shape: tuple[int, ...]
    dtype: str


class Shards:
    """The shards of one folder.

    `kind` is their format, a key of _READERS. `tensors` maps every stored name to its shape and dtype; the values are
    read tensor by tensor.
    """

    def __init__(self, files: list[Path], kind: str, index: dict[str, str] | None = None) -> None:
        self.files = files
        self.kind = kind
        self._headers: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self.tensors: dict[str, Stored] = {}
        for path in files:
            for name, entry in _READERS[kind].read_header(path).items():
                if name in self._file_of:
                    raise QwenVLError(f"{path}: tensor {name} is also in {self._file_of[name].name}")
                self._file_of[name] = path
                self._headers[name] = entry
                self.tensors[name] = Stored(entry.shape, entry.dtype)
        for name, file_name in (index or {}).items():
            if self._file_of.get(name) is None or self._file_of[name].name != file_name:
                raise QwenVLError(
                    f"{files[0].parent}: the index lists {name} in {file_name}, which does not contain it"
                )

    @classmethod
    def open(cls, folder: Path, weight_files: Sequence[tuple[str, str]] = WEIGHT_FILES) -> Shards:
        """Find and index the weight files of a folder, the first of `weight_files` that exists, else AutoGPTQ's.

        Raises:
            UsageError: the folder has no weight file with a known name.
            QwenVLError: the index does not fit the files, or a file is missing or damaged.
        """
        # In reverse order, the index NAME.safetensors.index.json precedes the weight file NAME.safetensors.
        matches = [_AUTOGPTQ.fullmatch(path.name) for path in sorted(folder.iterdir(), reverse=True)]
        candidates = [*weight_files, *((match[0], match[1]) for match in matches if match)]
        for name, kind in candidates:
            path = folder / name
            if not path.is_file():
                continue
            if not name.endswith(".index.json"):
                return cls([path], kind)
            index = read_index(path)
            files = [folder / file_name for file_name in sorted(set(index.values()))]
            for file in files:
                if file.suffix != f".{kind}":
                    raise QwenVLError(f"{path}: the index names {file.name}, which is not a .{kind} file")
                if not file.is_file():
                    raise QwenVLError(f"{file}: missing, though {name} names it; copy the folder again")
            return cls(files, kind, index)
        unlisted = [path.name for path in sorted(folder.iterdir()) if _SHARD.search(path.name)]
        if unlisted:
            raise UsageError(
                f"{folder}: holds shards, such as {unlisted[0]}, but not their .index.json; copy it, too"
            )
        searched = ", ".join(name for name, _ in weight_files)
        raise UsageError(f"{folder}: no weights in it (looked for {searched})")

    def read(self, names: set[str]) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield the named tensors in storage type, shard by shard.

        Raises:
            QwenVLError: the values of a tensor are damaged.
        """
        for name, path in self._file_of.items():
            if name in names:
                yield name, _READERS[self.kind].read_tensor(path, self._headers[name])

    def file_of(self, name: str) -> Path:
        """The file that contains a tensor."""
        return self._file_of[name]

    def unlisted(self) -> list[str]:
        """Names of shards in the folder that are not read, although they have the same format as those that are."""
        folder, names = self.files[0].parent, {path.name for path in self.files}
        shards = (path.name for path in sorted(folder.glob(f"*.{self.kind}")) if _SHARD.search(path.name))
        return [name for name in shards if name not in names]


def read_index(path: Path) -> dict[str, str]:
    """Read the index of a sharded checkpoint: tensor name -> file name.

    Raises:
        QwenVLError: not an index, a tensor is listed twice, or a file is outside the folder.
    """
    content = read_json(path, unique=True)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise QwenVLError(f"{path}: not a weight index, a JSON object with 'weight_map'; copy it again")
    if not index:
        raise QwenVLError(f"{path}: the index names no tensor")
    for file in index.values():
        if Path(file).name != file or file == ".." or "\\" in file or "\0" in file:
            raise QwenVLError(f"{path}: the index names a file outside its folder: {file}")
    return index
