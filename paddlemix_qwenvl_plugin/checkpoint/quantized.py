"""The quantized linear weights of a checkpoint, read without dequantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint import awq, gptq
from paddlemix_qwenvl_plugin.checkpoint.dtypes import to_float32
from paddlemix_qwenvl_plugin.checkpoint.grouped import GroupedMatrix, engine_group
from paddlemix_qwenvl_plugin.checkpoint.quant_config import QuantConfig
from paddlemix_qwenvl_plugin.checkpoint.shards import Shards, Stored
from paddlemix_qwenvl_plugin.checkpoint.tensor_parallel import Ranks
from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

_FLOATS = ("float16", "bfloat16", "float32")
_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")


class QuantizedLinears:
    """The quantized weights of a checkpoint: all linear weights of the language model except lm_head.

    Attributes:
        quant_type: the export's name for this storage, such as "gptq_int4_g128"; ends with "_order" if `read` has to
            sort the inputs of at least one weight by group.

    Args:
        folder: the model folder, for messages.
        specs: the language model's tensors.
        canonical: canonical name -> stored name of all tensors. The constructor removes those that it reads: qweight,
            qzeros, scales and g_idx of the quantized layers, and the zero biases that quantizers store for layers
            without bias. The biases in `specs`, those of c_attn, stay.

    Raises:
        QwenVLError: a tensor is missing, has a wrong shape, dtype or values, or is not quantized; or a tensor outside
            of the language model's blocks is quantized.
    """

    def __init__(
        self,
        folder: Path,
        config: QuantConfig,
        shards: Union[Shards, Ranks],
        specs: Mapping[str, TensorSpec],
        canonical: dict[str, str],
    ) -> None:
        self._folder, self._config, self._shards = folder, config, shards
        self._specs = {name: spec for name, spec in specs.items() if spec.linear and name != "lm_head.weight"}
        self._tensors = {name: self._match(name, specs, canonical) for name in self._specs}
        for name, stored_name in canonical.items():
            if name.endswith(".qweight"):
                raise QwenVLError(
                    f"{folder}: tensor {stored_name} is quantized; only linear layers of the language model's blocks "
                    "may be"
                )
        bits, group = config.bits, engine_group(config.group_size)
        orders = [self._input_order(name) for name in self._specs]
        suffix = "_order" if any(order is not None for order in orders) else ""
        self.quant_type = f"{config.method}_int{bits}_g{group}{suffix}"

    @property
    def names(self) -> list[str]:
        """Canonical names of the quantized weights, such as h.0.mlp.w1.weight."""
        return list(self._specs)

    @property
    def stored(self) -> dict[str, Stored]:
        """Shape and dtype of the tensors that store the weights, by canonical name, such as h.0.mlp.w1.qweight."""
        return {name: self._shards.tensors[stored_name] for name, stored_name in self._stored_names().items()}

    def read_stored(self, name: str) -> NDArray[np.generic]:
        """Read one of the tensors in `stored` unchanged, by its canonical name."""
        [(_, values)] = self._shards.read({self._stored_names()[name]})
        return values

    def read(self, name: str) -> GroupedMatrix:
        """Read one weight by its canonical name.

        Raises:
            QwenVLError: a scale is infinite, not a number, or not exact in float16; or a file is damaged.
        """
        stored = self._tensors[name]
        by_stored_name = {stored_name: suffix for suffix, stored_name in stored.items() if suffix != "bias"}
        tensors: dict[str, NDArray[Any]] = {
            by_stored_name[stored_name]: values
            for stored_name, values in self._shards.read(set(by_stored_name))
        }
        scales = stored["scales"]
        tensors["scales"] = self._exact_float16(tensors["scales"], self._shards.tensors[scales].dtype, scales)
        if self._config.method == "awq":
            return awq.unpack(tensors, self._config)
        return gptq.unpack(tensors, self._config, self._layer_for_message(name))

    def _stored_names(self) -> dict[str, str]:
        return {
            f"{name[: -len('.weight')]}.{suffix}": stored_name
            for name, tensors in self._tensors.items()
            for suffix, stored_name in tensors.items()
        }

    def _match(self, name: str, specs: Mapping[str, TensorSpec], canonical: dict[str, str]) -> dict[str, str]:
        """Remove a linear layer's tensors, except a bias in `specs`, from `canonical`; return suffix -> stored name."""
        layer = name[: -len(".weight")]
        if name in canonical:
            raise QwenVLError(
                f"{self._folder}: tensor {canonical[name]} is not quantized; quantize all linear layers of the blocks, "
                "or none"
            )
        stored_names = {
            suffix: canonical.pop(f"{layer}.{suffix}")
            for suffix in _SUFFIXES
            if f"{layer}.{suffix}" in canonical and f"{layer}.{suffix}" not in specs
        }
        n_in, n_out = self._specs[name].shape
        shapes = (awq if self._config.method == "awq" else gptq).shapes(n_in, n_out, self._config)
        for suffix in shapes:
            if suffix not in stored_names and (suffix != "g_idx" or self._config.act_order):
                raise QwenVLError(f"{self._folder}: tensor {layer}.{suffix} is missing")
        if n_in * self._config.bits % 32 or n_out * self._config.bits % 32:
            raise QwenVLError(
                f"{self._folder}: {layer} has {n_in} inputs and {n_out} outputs, which do not fill int32 words"
            )
        for suffix, stored_name in stored_names.items():
            self._check(suffix, stored_name, shapes.get(suffix, (n_out,)))
        if "bias" in stored_names:
            self._check_zero(stored_names["bias"])
        return stored_names

    def _check(self, suffix: str, stored_name: str, shape: tuple[int, ...]) -> None:
        stored = self._shards.tensors[stored_name]
        if stored.shape != shape:
            files = " and ".join(sorted({"config.json", self._config.origin.name}))
            raise QwenVLError(
                f"{self._folder}: tensor {stored_name} has shape {list(stored.shape)}, {files} "
                f"{'require' if ' and ' in files else 'requires'} {list(shape)}"
            )
        allowed = {"qweight": ("int32",), "qzeros": ("int32",), "g_idx": ("int32", "int64")}.get(
            suffix, _FLOATS
        )
        if stored.dtype not in allowed:
            raise QwenVLError(
                f"{self._folder}: tensor {stored_name} has dtype {stored.dtype}, it must be {' or '.join(allowed)}"
            )

    def _check_zero(self, stored_name: str) -> None:
        [(_, values)] = self._shards.read({stored_name})
        if to_float32(values, self._shards.tensors[stored_name].dtype).any():
            raise QwenVLError(
                f"{self._folder}: tensor {stored_name} is not zero; the model has no such bias, and none is exported"
            )

    def _input_order(self, name: str) -> Optional[NDArray[np.int32]]:
        if "g_idx" not in self._tensors[name]:
            return None
        [(_, g_idx)] = self._shards.read({self._tensors[name]["g_idx"]})
        n_in, _ = self._specs[name].shape
        return gptq.sorted_inputs(g_idx, n_in, self._config.group_size, self._layer_for_message(name))

    def _layer_for_message(self, name: str) -> str:
        stored_name = self._tensors[name]["qweight"]
        return f"{self._folder}: {stored_name[: -len('.qweight')]}"

    def _exact_float16(self, values: NDArray[Any], dtype: str, stored_name: str) -> NDArray[np.float16]:
        wide = to_float32(values, dtype)
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.isfinite(half).all() or (half != wide).any():
            raise QwenVLError(
                f"{self._folder}: tensor {stored_name} holds scales that are not finite numbers of float16"
            )
        return half
