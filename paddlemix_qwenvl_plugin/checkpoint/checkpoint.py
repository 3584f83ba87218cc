"""Read a model folder in any upstream naming scheme (schemes.py) and layout, under canonical names (tensors.py)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig, load_config
from paddlemix_qwenvl_plugin.checkpoint.dtypes import FLOATS, cast, to_float32
from paddlemix_qwenvl_plugin.checkpoint.lora import Lora, Merge, PathLike
from paddlemix_qwenvl_plugin.checkpoint.quant_config import load_quant_config
from paddlemix_qwenvl_plugin.checkpoint.quantized import QuantizedLinears
from paddlemix_qwenvl_plugin.checkpoint.schemes import SCHEMES
from paddlemix_qwenvl_plugin.checkpoint.shards import WEIGHT_FILES, Shards
from paddlemix_qwenvl_plugin.checkpoint.tensor_parallel import Ranks
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec, language_specs, vision_specs
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

# Buffers that some checkpoints contain; ignored, because their values follow from the config.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|logn_tensor)$")


@dataclass(frozen=True)
class _Entry:
    stored_name: str
    dtype: str
    transposed: bool  # stored as [out, in]


class Checkpoint:
    """The weights of a model folder under canonical names, in Paddle's [in, out] layout.

    The checkpoint must contain exactly the tensors of the model, with the right shapes; some buffers are ignored. The
    naming scheme is detected from the names; the layouts of the language model and of the vision stage are detected
    from the shapes.

    Args:
        folder: the model folder.
        lora: the folder of an adapter to merge, or several adapters, each a folder or (folder, factor).

    Attributes:
        language, vision: the specs of the stages' tensors by canonical name.
        quantized: the weights quantized by GPTQ or AWQ, which `tensors` does not read; None without such weights.
        merge: the adapters to merge.

    Raises:
        UsageError: the folder, its config or its weights do not exist; an adapter for quantized or tied weights.
        QwenVLError: a file is damaged, the quantization is not supported, or a tensor is missing, unknown, mis-shaped
            or laid out unlike the others; the message names the file or tensor.
        UsageError, QwenVLError: as for Merge.
    """

    def __init__(self, folder: Path, lora: Union[PathLike, Sequence[Lora]] = ()) -> None:
        self.folder = Path(folder)
        self.config: ModelConfig = load_config(self.folder)
        self._shards = open_weights(self.folder)
        self.language = language_specs(self.config)
        self.vision = vision_specs(self.config)
        self._allow_position_table()
        self.quantized: Optional[QuantizedLinears] = None
        self._entries = self._match()
        self.merge = Merge(lora, {**self.language, **self.vision})
        self._check_merge()

    @property
    def scheme(self) -> str:
        """The naming scheme of the weights: "Hugging Face", "Paddle static" or "PaddleMIX"."""
        prefix = self._entries["wte.weight"].stored_name[: -len("wte.weight")]
        return next(scheme.title for scheme in SCHEMES.values() if scheme.language == prefix)

    @property
    def dtype(self) -> str:
        """The storage type of the token embedding: float32, float16, bfloat16 or float64."""
        return self._entries["wte.weight"].dtype

    def dtype_of(self, name: str) -> str:
        """The storage type of a canonical tensor: float32, float16, bfloat16 or float64.

        Raises:
            UsageError: the tensor is quantized.
        """
        self._refuse_quantized([name])
        return self._entries[name].dtype

    def tensors(
        self, specs: dict[str, TensorSpec], dtype: str, out_in: bool = False
    ) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Yield (canonical name, values) in `dtype`, bfloat16 as uint16 bits.

        Linear weights are [in, out], with `out_in` [out, in]. Tensors are read one at a time.

        Raises:
            UsageError: a tensor is quantized.
            QwenVLError: a value does not fit into float16, or a file is damaged.
        """
        self._refuse_quantized(specs)
        names: dict[str, list[str]] = {}
        for name in specs:
            # A tied lm_head has the stored name of wte.
            names.setdefault(self._entries[name].stored_name, []).append(name)
        for stored_name, array in self._shards.read(set(names)):
            for name in names[stored_name]:
                entry = self._entries[name]
                values, stored_dtype = array, entry.dtype
                if name in self.merge.names:
                    values, stored_dtype = to_float32(array, entry.dtype), "float32"
                    self.merge.apply(name, values, entry.transposed)
                values = cast(values, stored_dtype, dtype, name)
                transpose = specs[name].linear and entry.transposed != out_in
                yield name, np.ascontiguousarray(values.T) if transpose else values

    def fingerprint(self) -> str:
        """Compute a digest of the model, independent of naming scheme and layout.

        Of the adapters' changes, it covers only those to the vision stage. One vision stage therefore fits all language
        stages whose adapters change only the language model.

        Hashes the config and the first 64 values of each norm and bias, rounded to float16. A conversion of the folder
        to float16, or one to bfloat16 without rounding, keeps the digest.
        """
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        specs = {**self.language, **self.vision}
        vectors = [name for name, spec in specs.items() if len(spec.shape) == 1]
        names = {self._entries[name].stored_name: name for name in vectors}
        hashed: dict[str, bytes] = {}
        for stored_name, array in self._shards.read(set(names)):
            name = names[stored_name]
            with np.errstate(over="ignore"):
                hashed[name] = to_float32(array[:64], self._entries[name].dtype).astype(np.float16).tobytes()
        for name in sorted(hashed):
            digest.update(name.encode() + hashed[name])
        digest.update(self.merge.fingerprint(self.vision).encode())
        return digest.hexdigest()

    def _check_merge(self) -> None:
        quantized = set() if self.quantized is None else self.merge.names & set(self.quantized.names)
        if quantized:
            raise UsageError(
                f"--lora: {min(quantized)} of {self.folder} is stored as integers, into which no adapter can be "
                "merged; load it at run time with --adapter"
            )
        tied = self.merge.names & {"wte.weight", "lm_head.weight"}
        if tied and self.config.tie_word_embeddings:
            raise UsageError(
                f"--lora: an adapter changes {min(tied)}, but {self.folder} has one tensor for wte and lm_head "
                "(tie_word_embeddings); merge it with the tool that made it"
            )

    def _refuse_quantized(self, names: Iterable[str]) -> None:
        if self.quantized is not None and not self._entries.keys() >= set(names):
            raise UsageError(
                f"{self.folder}: its weights are quantized ({self.quantized.quant_type}); only export-language "
                "and convert read them"
            )

    def _allow_position_table(self) -> None:
        """Accept a ViT's position table with any square number of rows: the export resizes it to the patch grid."""
        name = "visual.positional_embedding"
        for stored_name, stored in self._shards.tensors.items():
            rows = stored.shape[0] if stored.shape else 0
            if stored_name.endswith(".positional_embedding") and math.isqrt(rows) ** 2 == rows > 0:
                self.vision[name] = TensorSpec((rows, *self.vision[name].shape[1:]))

    def _hint_about_missing(self, name: str) -> str:
        """Possible cause of a missing tensor, to append to the error message; empty if no cause is found."""
        if name == "lm_head.weight":
            return "; if it is the token embedding, set tie_word_embeddings to true in config.json"
        unlisted = self._shards.unlisted()
        return f"; {unlisted[0]} is not in the index" if unlisted else ""

    def _match(self) -> dict[str, _Entry]:
        """Match stored names to canonical names, check shapes and dtypes; set `quantized`."""
        specs = {**self.language, **self.vision}
        canonical = self._canonical_names()
        quantization = load_quant_config(self.folder)
        if any(name.endswith(".qweight") for name in canonical):
            if quantization is None:
                raise QwenVLError(
                    f"{self.folder}: holds quantized tensors, but config.json has no quantization_config"
                )
            self.quantized = QuantizedLinears(
                self.folder, quantization, self._shards, self.language, canonical
            )
            specs = {name: spec for name, spec in specs.items() if name not in self.quantized.names}
        elif quantization is not None and quantization.origin.name == "config.json":
            # Another file that describes a quantization is ignored beside weights in floating point.
            raise QwenVLError(
                f"{self.folder}: no tensor is quantized, though config.json has quantization_config; remove it there"
            )
        tied = self.config.tie_word_embeddings
        if tied:
            # As in transformers, the embedding is the lm_head, even if the folder also stores an lm_head.
            canonical["lm_head.weight"] = canonical["wte.weight"]
        for name in specs:
            if name not in canonical:
                raise QwenVLError(f"{self.folder}: tensor {name} is missing{self._hint_about_missing(name)}")
        for name, stored_name in canonical.items():
            if name not in specs:
                raise QwenVLError(
                    f"{self.folder}: tensor {stored_name} is not part of this model (see config.json)"
                )
        entries: dict[str, _Entry] = {}
        for stage_specs in (self.language, self.vision):
            float_specs = {name: spec for name, spec in stage_specs.items() if name in specs}
            transposed = self._layout(float_specs, canonical)
            for name, spec in float_specs.items():
                stored_name = canonical[name]
                stored = self._shards.tensors[stored_name]
                if stored.dtype not in FLOATS:
                    raise QwenVLError(
                        f"{self._shards.file_of(stored_name)}: {stored_name} has dtype {stored.dtype}, a weight "
                        f"must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}"
                    )
                is_out_in = (transposed and spec.linear) or (tied and name == "lm_head.weight")
                entries[name] = _Entry(stored_name, stored.dtype, is_out_in)
        return entries

    def _canonical_names(self) -> dict[str, str]:
        """Map canonical names to stored names."""
        stored = [name for name in self._shards.tensors if not _BUFFERS.search(name)]
        prefixes = [scheme.language for scheme in SCHEMES.values()]
        scheme_prefix = next((prefix for prefix in prefixes if f"{prefix}wte.weight" in stored), None)
        if scheme_prefix is None:
            candidates = " or ".join(f"{prefix}wte.weight" for prefix in prefixes)
            raise QwenVLError(f"{self.folder}: not a Qwen-VL checkpoint, tensor {candidates} is missing")
        canonical: dict[str, str] = {}
        for name in stored:
            key = re.sub(r"^visual\.vit\.", "visual.", name.removeprefix(scheme_prefix))
            if key in canonical:
                raise QwenVLError(
                    f"{self.folder}: tensors {canonical[key]} and {name} are the same tensor twice"
                )
            canonical[key] = name
        return canonical

    def _layout(self, specs: dict[str, TensorSpec], canonical: dict[str, str]) -> bool:
        """Check the shapes of one stage's tensors; return whether its linear weights are stored as [out, in]."""
        evidence: Optional[tuple[bool, str]] = None
        for name, spec in specs.items():
            shape = self._shards.tensors[canonical[name]].shape
            if shape != spec.shape and not (spec.linear and shape == spec.shape[::-1]):
                raise QwenVLError(
                    f"{self.folder}: tensor {canonical[name]} has shape {list(shape)}, "
                    f"config.json requires {list(spec.shape)}"
                    + (" or its transpose" if spec.linear else "")
                    + _hint_about_shape(name, shape, spec)
                )
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue  # stored as the embedding, in its layout
            if spec.linear and spec.shape[0] != spec.shape[1]:
                transposed = shape != spec.shape
                if evidence is not None and evidence[0] != transposed:
                    raise QwenVLError(
                        f"{self.folder}: tensor {canonical[name]} is laid out "
                        f"{'[out, in]' if transposed else '[in, out]'}, unlike {evidence[1]}"
                    )
                evidence = (transposed, canonical[name])
        # Each stage has a fused projection to 3 times the width, a matrix that is never square. Only a quantized
        # language model with a square or tied lm_head gives no evidence; every quantizer stores lm_head as [out, in].
        return evidence is None or evidence[0]


# Tensor -> key of config.json that sets its number of rows; of lm_head, which is linear, the number of outputs.
_ROWS = {
    "wte.weight": "vocab_size",
    "lm_head.weight": "vocab_size",
    "visual.attn_pool.query": "n_queries of visual",
    "visual.attn_pool.pos_embed": "n_queries of visual",
}


def open_weights(folder: Path) -> Union[Shards, Ranks]:
    """Open the weight files of a folder: those of WEIGHT_FILES, else tensor-parallel ranks, else AutoGPTQ's.

    Raises:
        UsageError, QwenVLError: see Shards.open and Ranks.open.
    """
    if any((folder / name).is_file() for name, _ in WEIGHT_FILES):
        return Shards.open(folder)
    return Ranks.open(folder) or Shards.open(folder)


def _hint_about_shape(name: str, shape: tuple[int, ...], spec: TensorSpec) -> str:
    """Advice on the key of config.json that contradicts a shape, to append to the message; empty if no key does."""
    if name not in _ROWS or len(shape) != 2:
        return ""
    width = spec.shape[0] if spec.linear else spec.shape[1]
    rows = shape[0] if shape[1] == width else shape[1] if spec.linear and shape[0] == width else None
    return "" if rows is None else f"; if the weights are right, set {_ROWS[name]} to {rows}"
