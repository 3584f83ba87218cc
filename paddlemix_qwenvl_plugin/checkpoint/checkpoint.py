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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, load_config
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast, to_float32
from paddlemix_qwenvl_plugin.checkpoint.quant_config import load_quant_config
from paddlemix_qwenvl_plugin.checkpoint.quantised import QuantisedLinears
from paddlemix_qwenvl_plugin.checkpoint.shards import INTEGERS, Shards
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

    Attributes:
        quantised: the weights that are stored as integers by GPTQ or AWQ, else None; `tensors` does not read them.

    Raises:
        UsageError: the folder, its config or its weights do not exist.
        QwenVLError: a tensor is missing, unknown, mis-shaped or laid out unlike the others; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config: ModelConfig = load_config(self.folder)
        self._quantization = load_quant_config(self.folder)
        self._shards = Shards.open(self.folder, integers=self._quantization is not None)
        self.quantised: Optional[QuantisedLinears] = None
        self.language = language_specs(self.config)
        self.vision = vision_specs(self.config)
        self._entries = self._match()

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

        Raises:
            UsageError: a tensor is quantised.
        """
        if self.quantised is not None and not self._entries.keys() >= specs.keys():
            raise UsageError(
                f"{self.folder}: its weights are quantised ({self.quantised.quant_type}); only "
                "export-language reads them"
            )
        names = {self._entries[name].stored_name: name for name in specs}
        for stored_name, array in self._shards.read(set(names)):
            name = names[stored_name]
            entry = self._entries[name]
            values = cast(array, entry.dtype, dtype, name)
            transpose = specs[name].linear and entry.transposed != out_in
            yield name, np.ascontiguousarray(values.T) if transpose else values

    def fingerprint(self) -> str:
        """A digest of the model's content, independent of naming scheme and layout.

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
        return digest.hexdigest()

    def _match(self) -> dict[str, _Entry]:
        specs = {**self.language, **self.vision}
        canonical = self._canonical_names()
        quantization = self._quantization
        if any(name.endswith(".qweight") for name in canonical) and quantization is not None:
            self.quantised = QuantisedLinears(
                self.folder, quantization, self._shards, self.language, canonical
            )
            specs = {name: spec for name, spec in specs.items() if name not in self.quantised.names}
        elif quantization is not None and quantization.origin.name == "config.json":
            raise QwenVLError(
                f"{self.folder}: no tensor is quantised, though config.json has quantization_config; remove it there"
            )
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
            part = {name: spec for name, spec in part.items() if name in specs}
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
            stored = self._shards.tensors[canonical[name]]
            if stored.dtype in INTEGERS:
                raise QwenVLError(
                    f"{self.folder}: tensor {canonical[name]} has dtype {stored.dtype}, a weight must be a "
                    "floating-point tensor"
                )
            shape = stored.shape
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
        # Each half has a fused 3x projection, which is never square; a quantised half may have only a square lm_head,
        # which every quantizer stores as [out, in].
        return evidence is None or evidence[0]
