"""The tensors of a LoRA adapter, saved by PEFT or PaddleNLP, under the canonical names of the weights they change."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.adapter_config import (
    LoraConfig,
    read_paddlenlp_config,
    read_peft_config,
)
from paddlemix_qwenvl_plugin.checkpoint.dtypes import FLOATS, to_float32
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.checkpoint.shards import Shards
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError
from paddlemix_qwenvl_plugin.util.notice import notice


class _Format(NamedTuple):
    config: str
    read_config: Callable[[Path], LoraConfig]
    weights: tuple[tuple[str, str], ...]  # as WEIGHT_FILES in shards.py; the first that exists is read
    out_in: (
        bool  # whether matrices are stored as [out, in], and A and B likewise as [rank, in] and [out, rank]
    )


_FORMATS = (
    _Format(
        "adapter_config.json",
        read_peft_config,
        (("adapter_model.safetensors", "safetensors"), ("adapter_model.bin", "bin")),
        out_in=True,
    ),
    _Format(
        "lora_config.json",
        read_paddlenlp_config,
        (("lora_model_state.pdparams", "pdparams"), ("peft_model.safetensors.index.json", "safetensors")),
        out_in=False,
    ),
)

_PEFT_PREFIX = "base_model.model."
# Stored name of A or B, such as h.0.attn.c_attn.lora_A.default.weight.
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(embedding_)?(?P<matrix>[AB])(\.default)?(\.weight)?")
# Name components that PEFT inserts for trained biases (base_layer) and for modules that it saves completely.
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(\.default)?(?=\.)")


@dataclass(frozen=True)
class LowRank:
    """Low-rank update scaling * B A of a weight: the stored names of A and B, and the scaling.

    LowRank of engine/engine.py has the values of A and B instead.
    """

    a: str
    b: str
    scaling: float


class Adapter:
    """The tensors of an adapter under the canonical names of the weights that they change.

    `updates`: weight -> low-rank update. `replacements`: tensor -> stored name of its new values (PEFT's
    modules_to_save and trained biases, PaddleNLP's trainable_modules and trainable_bias).

    Args:
        folder: the folder that PEFT or PaddleNLP saved.
        specs: the tensors of the model.

    Raises:
        UsageError: the folder is missing or not an adapter.
        QwenVLError: an unsupported kind of adapter, a damaged file, or a tensor that does not fit the model; the
            message names it.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such adapter folder")
        detected = next((entry for entry in _FORMATS if (folder / entry.config).is_file()), None)
        if detected is None:
            names = " or ".join(entry.config for entry in _FORMATS)
            raise UsageError(f"{folder}: no {names} in it; is it a LoRA adapter?")
        self.folder = folder
        self.config = detected.read_config(folder / detected.config)
        self._out_in = detected.out_in
        self._shards = Shards.open(folder, detected.weights)
        self._specs = specs
        self.updates: dict[str, LowRank] = {}
        self.replacements: dict[str, str] = {}
        self._match()

    def update(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read A [in, rank] and B [rank, out] of a weight's update in Paddle's layout: W changes by scaling * A B."""
        stored = self.updates[name]
        a, b = self._read(stored.a), self._read(stored.b)
        return (a.T, b.T) if self._out_in else (a, b)

    def replacement(self, name: str) -> NDArray[np.float32]:
        """Read the values that replace a tensor; a linear weight is [in, out]."""
        values = self._read(self.replacements[name])
        return values.T if self._out_in and self._specs[name].linear else values

    def fingerprint(self, names: Iterable[str]) -> str:
        """Compute a digest of the adapter's changes to the named tensors, independent of the adapter's format.

        Hashes each tensor's name and scaling, and the first 64 values of its A, B and replacement, rounded to float16.
        """
        digest = hashlib.sha256()
        for name in sorted(names):
            update = self.update(name) if name in self.updates else ()
            replacement = (self.replacement(name),) if name in self.replacements else ()
            scaling = self.updates[name].scaling if name in self.updates else 1.0
            digest.update(f"{name} {scaling:.6g}".encode())
            for values in (*update, *replacement):
                with np.errstate(over="ignore"):
                    digest.update(values.reshape(-1)[:64].astype(np.float16).tobytes())
        return digest.hexdigest()

    @property
    def names(self) -> set[str]:
        """Names of the tensors that the adapter changes."""
        return {*self.updates, *self.replacements}

    def _read(self, stored_name: str) -> NDArray[np.float32]:
        [(_, values)] = self._shards.read({stored_name})
        return to_float32(values, self._shards.tensors[stored_name].dtype)

    def _match(self) -> None:
        """Fill `updates` and `replacements` from the stored names; check the tensors' shapes and dtypes."""
        modules: dict[str, str] = {}
        matrices: dict[str, dict[str, str]] = {}  # weight -> "A" or "B" -> stored name
        for stored in self._shards.tensors:
            match = _LOW_RANK.fullmatch(stored)
            name = f"{_canonical(match['module'])}.weight" if match else _canonical(_WRAPPERS.sub("", stored))
            if name not in self._specs:
                raise QwenVLError(f"{self._where(stored)} is not part of this model (see config.json)")
            if self._shards.tensors[stored].dtype not in FLOATS:
                raise QwenVLError(
                    f"{self._where(stored)} has dtype {self._shards.tensors[stored].dtype}, "
                    f"it must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
                )
            if match:
                table, key = matrices.setdefault(name, {}), match["matrix"]
                modules[name] = match["module"].removeprefix(_PEFT_PREFIX)
            else:
                table, key = self.replacements, name
            if key in table:
                raise QwenVLError(f"{self._where(stored)} and {table[key]} are the same tensor twice")
            table[key] = stored
        for name, stored in self.replacements.items():
            self._check_shape(stored, self._specs[name].shape, self._out_in and self._specs[name].linear)
        for name, stored_names in matrices.items():
            self.updates[name] = self._update(name, modules[name], stored_names)
        self._note_missing()

    def _update(self, name: str, module: str, stored: dict[str, str]) -> LowRank:
        """The low-rank update of a weight; `stored` maps "A" and "B" to stored names."""
        for missing, present in ("AB", "BA"):
            if missing not in stored:
                raise QwenVLError(f"{self._where(stored[present])} has no matching lora_{missing}")
        shape, rank = self._specs[name].shape, self.config.rank_of(module)
        if len(shape) != 2:
            raise QwenVLError(f"{self._where(stored['A'])} is for {name}; only matrices can be updated")
        self._check_shape(stored["A"], (shape[0], rank), self._out_in, rank)
        self._check_shape(stored["B"], (rank, shape[1]), self._out_in, rank)
        scaling = self.config.scaling(module)
        if abs(scaling) > float(np.finfo(np.float32).max):
            raise QwenVLError(
                f"{self.config.path}: the scaling of {module} is {scaling:.3g}, beyond float32; correct its alpha"
            )
        return LowRank(stored["A"], stored["B"], scaling)

    def _check_shape(self, stored: str, shape: tuple[int, ...], reverse: bool, rank: int = 0) -> None:
        """Raise QwenVLError unless a tensor has the given shape, or with `reverse` the reversed one.

        The message names `rank` if it is not 0.
        """
        required = shape[::-1] if reverse else shape
        actual = self._shards.tensors[stored].shape
        if actual != required:
            source = (
                f"config.json and {self.config.path.name} (rank {rank}) require"
                if rank
                else "config.json requires"
            )
            base = f"; the adapter is for {self.config.base}" if self.config.base else ""
            raise QwenVLError(
                f"{self._where(stored)} has shape {list(actual)}, {source} {list(required)}{base}"
            )

    def _note_missing(self) -> None:
        # finetune.py of Qwen-VL lists wte and lm_head, but saves them only under DeepSpeed ZeRO 3.
        for module in self.config.modules_to_save:
            if not any(f".{module}." in f".{name}" for name in self.replacements):
                notice(
                    f"{self.config.path}: modules_to_save has {module}, but no tensor of it is in the adapter; "
                    "the base's is kept"
                )

    def _where(self, stored: str) -> str:
        return f"{self.folder}: tensor {stored}"


def _canonical(stored: str) -> str:
    """The canonical name of a tensor or module in any naming scheme."""
    name = stored.removeprefix(_PEFT_PREFIX)
    prefixes = (scheme.language for scheme in SCHEMES.values())
    name = name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))
    return re.sub(r"^visual\.vit\.", "visual.", name)
