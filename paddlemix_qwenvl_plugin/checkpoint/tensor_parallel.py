"""The joined weights of tensor-parallel ranks, which PaddleNLP saves in files such as `model_state.tp00.pdparams`.

The split is that of PaddleNLP's `QWenPretrainedModel._get_tensor_parallel_mappings`; the layout is Paddle's [in, out].

| tensor | a rank has |
| --- | --- |
| `lm_head`, `w1`, `w2` | columns |
| `c_attn`, weight and bias | columns of query, then of key, then of value |
| `wte`, `attn.c_proj`, `mlp.c_proj` | rows |
| all other tensors | the complete tensor |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import read_json
from paddlemix_qwenvl_plugin.checkpoint.shards import Shards, Stored
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Keys that PaddleNLP adds to config.json for the weights of ranks; a folder with joined weights must not have them.
TENSOR_PARALLEL_KEYS = ("tensor_parallel_degree", "tensor_parallel_rank")

# File name: rank number, and for other kinds of parallelism a suffix such as _pp00.
_RANK = re.compile(r"(?:model_state|model)\.tp(\d\d)(_\w+)?\.(pdparams|safetensors)")
# (stored names, axis along which the ranks are joined, number of matrices fused along this axis)
_SPLITS = (
    (re.compile(r"(^|\.)(lm_head|h\.\d+\.mlp\.w[12])\.weight$"), -1, 1),
    (re.compile(r"(^|\.)h\.\d+\.attn\.c_attn\.(weight|bias)$"), -1, 3),
    (re.compile(r"(^|\.)(wte|h\.\d+\.(attn|mlp)\.c_proj)\.weight$"), 0, 1),
)


class Ranks:
    """The tensor-parallel ranks of one folder, joined, with the methods of Shards."""

    def __init__(self, ranks: list[Shards]) -> None:
        self._ranks = ranks
        self.tensors: dict[str, Stored] = {}
        for rank in ranks[1:]:
            unshared = sorted(rank.tensors.keys() ^ ranks[0].tensors.keys())
            if unshared:
                raise QwenVLError(
                    f"{rank.files[0]}: its tensors are not those of {ranks[0].files[0].name}, such as {unshared[0]}"
                )
        for name, first in ranks[0].tensors.items():
            for rank in ranks[1:]:
                if rank.tensors[name] != first:
                    raise QwenVLError(
                        f"{rank.files[0]}: {name} is {_describe(rank.tensors[name])}, but {_describe(first)} in "
                        f"{ranks[0].files[0].name}"
                    )
            self.tensors[name] = Stored(_joined_shape(name, first.shape, len(ranks)), first.dtype)

    @classmethod
    def open(cls, folder: Path) -> Optional[Ranks]:
        """Find the ranks in a folder; None if it has none.

        Raises:
            QwenVLError: a rank is missing or damaged or has other tensors than the first, or the model is also split
                in another way.
        """
        all_matches = {path: _RANK.fullmatch(path.name) for path in sorted(folder.iterdir())}
        matches = {path: match for path, match in all_matches.items() if match}
        if not matches:
            return None
        for path, match in matches.items():
            if match[2]:
                raise QwenVLError(
                    f"{path}: the model is split by more than tensor parallelism ({match[2][1:]}); merge it "
                    "with PaddleNLP first"
                )
        degree = read_json(folder / "config.json").get("tensor_parallel_degree")
        numbers = [int(match[1]) for match in matches.values()]
        # Rank numbers have two digits. Without a degree from 2 to 99 in config.json, the highest rank present is taken
        # as the last one.
        n_ranks = degree if type(degree) is int and 1 < degree < 100 else numbers[-1] + 1
        if numbers != list(range(n_ranks)):
            raise QwenVLError(
                f"{folder}: holds the tensor-parallel ranks {', '.join(f'tp{n:02}' for n in numbers)} of {n_ranks}; "
                "copy all ranks, each once"
            )
        return cls([Shards([path], match[3]) for path, match in matches.items()])

    def read(self, names: set[str]) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield the named tensors in storage type, joined from the ranks one tensor at a time.

        Raises:
            QwenVLError: a vector of which each rank has the complete tensor differs between the ranks, or the values of
                a tensor are damaged.
        """
        for name in self.tensors:
            if name in names:
                split = _split(name)
                # A matrix that is not split is read from the first rank only; a vector is cheap to compare.
                is_vector = len(self.tensors[name].shape) == 1
                ranks = self._ranks if split or is_vector else self._ranks[:1]
                parts = [array for rank in ranks for _, array in rank.read({name})]
                if split is None and any(
                    not np.array_equal(part, parts[0], equal_nan=True) for part in parts[1:]
                ):
                    raise QwenVLError(
                        f"{self._ranks[0].files[0].parent}: {name} differs between the tensor-parallel ranks; "
                        "they are of different models or steps"
                    )
                yield name, _join(parts, *split) if split else parts[0]

    def file_of(self, name: str) -> Path:
        """The file that contains a tensor, or the first rank's part of it."""
        return self._ranks[0].file_of(name)

    def unlisted(self) -> list[str]:
        """Names of shards in the folder that are not read: none, since ranks have no index."""
        return []


def _split(name: str) -> Optional[tuple[int, int]]:
    """The axis along which a tensor is joined and the number of its fused matrices; None if it is not split."""
    return next(((axis, n_fused) for pattern, axis, n_fused in _SPLITS if pattern.search(name)), None)


def _joined_shape(name: str, shape: tuple[int, ...], n_ranks: int) -> tuple[int, ...]:
    split = _split(name)
    if split is None or not shape:
        return shape
    axis, _ = split
    joined = list(shape)
    joined[axis] *= n_ranks
    return tuple(joined)


def _join(parts: list[NDArray[np.generic]], axis: int, n_fused: int) -> NDArray[np.generic]:
    """Join the ranks' parts: the first fused matrix of all ranks, then the second of all ranks, then the third."""
    matrices = [np.array_split(part, n_fused, axis=axis) for part in parts]
    return np.concatenate([rank[i] for i in range(n_fused) for rank in matrices], axis=axis)


def _describe(stored: Stored) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
