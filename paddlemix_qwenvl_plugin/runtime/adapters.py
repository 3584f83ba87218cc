"""LoRA adapters at run time: separate from the model's weights, chosen by name for each request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.adapter import Adapter
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.tensors import language_specs, vision_specs
from paddlemix_qwenvl_plugin.engine.engine import LowRank
from paddlemix_qwenvl_plugin.util.errors import UsageError


def split_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Parse the NAME=FOLDER values of --adapter.

    Raises:
        UsageError: a value without a name or a folder, or a duplicate name.
    """
    folders: dict[str, Path] = {}
    for text in values:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UsageError(f"--adapter {text}: must be NAME=FOLDER")
        if name in folders:
            raise UsageError(
                f"--adapter {text}: the name {name} is given twice; name one of them differently"
            )
        folders[name] = Path(folder)
    return folders


def open_adapters(folders: Mapping[str, Union[str, Path]], config: ModelConfig) -> dict[str, Adapter]:
    """Open adapter folders and check that the engine supports them; tensor values are not read.

    Raises:
        UsageError: a folder is missing or not an adapter, or the adapter changes nothing, replaces a tensor, or updates
            other weights than those of the language model's linear layers.
        QwenVLError: an adapter is damaged, of an unsupported kind, or made for another model.
    """
    specs = {**language_specs(config), **vision_specs(config)}
    targets = {name for name, spec in language_specs(config).items() if spec.linear}
    adapters = {name: Adapter(Path(folder), specs) for name, folder in folders.items()}
    for adapter in adapters.values():
        unsupported = sorted({*adapter.replacements, *(adapter.updates.keys() - targets)})
        if unsupported:
            verb = "replaces" if unsupported[0] in adapter.replacements else "changes"
            raise UsageError(
                f"{adapter.folder}: {verb} {unsupported[0]}, which is fixed at run time; merge it with --lora at export"
            )
        if not adapter.updates:
            raise UsageError(f"{adapter.folder}: changes no matrix of the model; is it a LoRA adapter?")
    return adapters


def low_rank(adapter: Adapter) -> Iterator[LowRank]:
    """Read the updates of an adapter one at a time: in a 16-bit type if it holds A and B exactly, else in float32."""
    for name, entry in adapter.updates.items():
        a, b = adapter.update(name)  # [in, rank], [rank, out]
        factors: list[Any] = [np.ascontiguousarray(factor.T) for factor in (a, b)]
        dtype = "float32"
        for half_type, convert in _HALF_TYPES.items():
            converted = [convert(factor) for factor in factors]
            if all(factor is not None for factor in converted):
                factors, dtype = converted, half_type
                break
        yield LowRank(name, factors[0], factors[1], entry.scaling, dtype)


def _bfloat16(values: NDArray[np.float32]) -> Optional[NDArray[Any]]:
    """Convert to bfloat16 (as uint16); None if a value would be rounded."""
    bits = values.view(np.uint32)
    return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)


def _float16(values: NDArray[np.float32]) -> Optional[NDArray[Any]]:
    """Convert to float16; None if a value would be rounded."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    return rounded if np.array_equal(rounded.astype(np.float32), values) else None


# The 16-bit types in which training code saves adapters: `Adapter.update` converts them to float32, `low_rank` back.
_HALF_TYPES = {"bfloat16": _bfloat16, "float16": _float16}
