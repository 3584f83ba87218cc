"""Merge LoRA adapters into the tensors of a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.adapter import Adapter
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.util.errors import UsageError

PathLike = Union[str, Path]
Lora = Union[PathLike, tuple[PathLike, float]]
"""An adapter to merge: its folder, or (folder, weight)."""


class Merge:
    """Adapters, each with a weight (a factor), merged into the tensors of a model, one tensor at a time.

    If an adapter replaces a tensor W by T, W becomes W + weight * (T - W). Then weight * scaling * B A of each adapter
    is added.

    Args:
        lora: the folder of an adapter, or a list of adapters.
        specs: the tensors of the model.

    Raises:
        UsageError: a weight is NaN or beyond float32, or two adapters replace the same tensor.
        UsageError, QwenVLError: as for Adapter.
    """

    def __init__(self, lora: Union[PathLike, Sequence[Lora]], specs: Mapping[str, TensorSpec]) -> None:
        entries = [lora] if isinstance(lora, (str, Path)) else lora
        weighted = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in entries]
        for path, weight in weighted:
            if not abs(weight) <= np.finfo(np.float32).max:
                raise UsageError(
                    f"--lora {path}: the weight is {weight:.3g}; use a number within float32's range"
                )
        self.adapters = [(Adapter(Path(path), specs), float(weight)) for path, weight in weighted]
        self.names = {name for adapter, _ in self.adapters for name in adapter.names}
        replaced: dict[str, Adapter] = {}
        for adapter, _ in self.adapters:
            for name in adapter.replacements:
                if name in replaced:
                    raise UsageError(
                        f"--lora: {replaced[name].folder} and {adapter.folder} both replace {name}; merge one of them"
                    )
                replaced[name] = adapter

    def apply(self, name: str, values: NDArray[np.float32], transposed: bool) -> None:
        """Merge the adapters into a tensor in place; a linear weight is [in, out], or [out, in] if `transposed`."""
        for adapter, weight in self.adapters:
            if name in adapter.replacements:
                target = adapter.replacement(name)
                target = target.T if transposed else target
                # With the weight 1, exactly T: the formula would round.
                values[...] = target if weight == 1 else values + np.float32(weight) * (target - values)
        for adapter, weight in self.adapters:
            if name in adapter.updates:
                a, b = adapter.update(name)  # [in, rank] and [rank, out], the transposes of A and B above
                a = a * np.float32(weight * adapter.updates[name].scaling)
                values += b.T @ a.T if transposed else a @ b

    def fingerprint(self, names: Iterable[str]) -> str:
        """Compute a digest of the changes to the named tensors; the empty string if no adapter changes them."""
        changed = self.names.intersection(names)
        parts = [
            f"{weight!r} {adapter.fingerprint(adapter.names & changed)}"
            for adapter, weight in self.adapters
            if adapter.names & changed
        ]
        return " ".join(sorted(parts))
