"""Read a model folder in any upstream naming scheme and linear layout as canonical tensors.

| scheme | language | vision |
| --- | --- | --- |
| Hugging Face | `transformer.h.…` | `transformer.visual.…` |
| Paddle static | `qwen.h.…` | `visual.vit.…`, the resampler `visual.…` |
| PaddleMIX | `transformer.llm.h.…` | as Paddle static |
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, load_config, read_json
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast, to_float32
from paddlemix_qwenvl_plugin.checkpoint.lora import Lora, Merge, PathLike
from paddlemix_qwenvl_plugin.checkpoint.shards import Shards
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# Buffers in some checkpoints; the config determines them.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)$")
# Naming scheme -> prefix of the language model's names.
_LANGUAGE_PREFIXES = {
    "PaddleMIX": "transformer.llm.",
    "Paddle static": "qwen.",
    "Hugging Face": "transformer.",
}


@dataclass(frozen=True)
class _Entry:
    stored_name: str
    dtype: str
    transposed: bool


class Checkpoint:
    """The weights of a model folder under canonical names, in Paddle's [in, out] layout.

    The checkpoint must contain exactly the tensors of the model, with the right shapes. The naming scheme and the
    layout of each half of the model are detected from the names and shapes.

    Args:
        folder: the model folder.
        lora: adapters to merge into the weights, each a folder or (folder, weight).

    Raises:
        UsageError: the folder, its config or its weights do not exist; adapters for a quantized checkpoint.
        QwenVLError: a tensor is missing, unknown, mis-shaped or laid out unlike the others; the message names it.
    """

    def __init__(self, folder: Path, lora: Union[PathLike, Sequence[Lora]] = ()) -> None:
        self.folder = Path(folder)
        self.config: ModelConfig = load_config(self.folder)
        if lora:
            self._refuse_integers()
        self._shards = Shards.open(self.folder)
        self.language = language_specs(self.config)
        self.vision = vision_specs(self.config)
        self._entries = self._match()
        self.merge = Merge(lora, {**self.language, **self.vision})

    @property
    def scheme(self) -> str:
        """The naming scheme of the weights: "Hugging Face", "Paddle static" or "PaddleMIX"."""
        prefix = self._entries["wte.weight"].stored_name[: -len("wte.weight")]
        return next(name for name, its in _LANGUAGE_PREFIXES.items() if its == prefix)

    @property
    def dtype(self) -> str:
        """The storage type of the token embedding: float32, float16, bfloat16 or float64."""
        return self._entries["wte.weight"].dtype

    def tensors(
        self, specs: dict[str, TensorSpec], dtype: str, out_in: bool = False
    ) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield (canonical name, values) in `dtype`, bfloat16 as uint16 bits.

        Linear weights are [in, out], with `out_in` [out, in]. At most one tensor (safetensors, PyTorch) or one weight
        file (.pdparams) is in memory at a time.
        """
        names = {self._entries[name].stored_name: name for name in specs}
        for stored_name, array in self._shards.read(set(names)):
            name = names[stored_name]
            entry = self._entries[name]
            if name in self.merge.names:
                merged = to_float32(array, entry.dtype)
                self.merge.apply(name, merged, entry.transposed)
                values = cast(merged, "float32", dtype, name)
            else:
                values = cast(array, entry.dtype, dtype, name)
            transpose = specs[name].linear and entry.transposed != out_in
            yield name, np.ascontiguousarray(values.T) if transpose else values

    def fingerprint(self) -> str:
        """A digest of the model's content, independent of naming scheme and layout.

        Adapters count as far as they change the vision stage: a vision stage without them fits every language stage
        that differs in adapters of the language model only.

        Hashes the config and up to 64 values of each norm and bias, rounded to float16: a conversion of the folder to
        float16, or an exact one to bfloat16, keeps the digest.
        """
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        small = {
            name: spec for name, spec in {**self.language, **self.vision}.items() if len(spec.shape) == 1
        }
        names = {self._entries[name].stored_name: name for name in small}
        rows = {}
        for stored_name, array in self._shards.read(set(names)):
            name = names[stored_name]
            with np.errstate(over="ignore"):
                rows[name] = to_float32(array[:64], self._entries[name].dtype).astype(np.float16).tobytes()
        for name in sorted(rows):
            digest.update(name.encode() + rows[name])
        digest.update(self.merge.fingerprint(self.vision).encode())
        return digest.hexdigest()

    def _refuse_integers(self) -> None:
        quantization = read_json(self.folder / "config.json").get("quantization_config")
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UsageError(
                f"--lora: {self.folder} is quantized ({method}), and no adapter can be merged into integers; "
                "open the adapter beside the model: --adapter"
            )

    def _match(self) -> dict[str, _Entry]:
        specs = {**self.language, **self.vision}
        canonical = self._canonical_names()
        for name in specs:
            if name not in canonical:
                raise QwenVLError(f"{self.folder}: tensor {name} is missing")
        for name, stored_name in canonical.items():
            if name not in specs:
                raise QwenVLError(
                    f"{self.folder}: tensor {stored_name} is not part of this model (see config.json)"
                )
        entries: dict[str, _Entry] = {}
        for part in (self.language, self.vision):
            transposed = self._layout(part, canonical)
            for name, spec in part.items():
                stored_name = canonical[name]
                stored = self._shards.tensors[stored_name]
                entries[name] = _Entry(stored_name, stored.dtype, transposed and spec.linear)
        return entries

    def _canonical_names(self) -> dict[str, str]:
        """Map canonical names to stored names."""
        stored = [name for name in self._shards.tensors if not _BUFFERS.search(name)]
        prefixes = _LANGUAGE_PREFIXES.values()
        scheme = next((p for p in prefixes if f"{p}wte.weight" in stored), None)
        if scheme is None:
            candidates = " or ".join(f"{prefix}wte.weight" for prefix in prefixes)
            raise QwenVLError(f"{self.folder}: not a Qwen-VL checkpoint, tensor {candidates} is missing")
        canonical: dict[str, str] = {}
        for name in stored:
            key = re.sub(r"^visual\.vit\.", "visual.", name.removeprefix(scheme))
            if key in canonical:
                raise QwenVLError(
                    f"{self.folder}: tensors {canonical[key]} and {name} are the same tensor twice"
                )
            canonical[key] = name
        return canonical

    def _layout(self, specs: dict[str, TensorSpec], canonical: dict[str, str]) -> bool:
        """Check every shape; return whether this half's linear weights are stored as [out, in]."""
        evidence: Optional[tuple[bool, str]] = None
        for name, spec in specs.items():
            shape = self._shards.tensors[canonical[name]].shape
            if shape != spec.shape and not (spec.linear and shape == spec.shape[::-1]):
                raise QwenVLError(
                    f"{self.folder}: tensor {canonical[name]} has shape {list(shape)}, "
                    f"config.json requires {list(spec.shape)}" + (" or its transpose" if spec.linear else "")
                )
            if spec.linear and spec.shape[0] != spec.shape[1]:
                transposed = shape != spec.shape
                if evidence is not None and evidence[0] != transposed:
                    raise QwenVLError(
                        f"{self.folder}: tensor {canonical[name]} is laid out "
                        f"{'[out, in]' if transposed else '[in, out]'}, unlike {evidence[1]}"
                    )
                evidence = (transposed, canonical[name])
        # Each half has a fused 3x projection, which is never square.
        return evidence is not None and evidence[0]
