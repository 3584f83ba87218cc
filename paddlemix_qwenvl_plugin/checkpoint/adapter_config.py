"""The settings of a LoRA adapter: `adapter_config.json` of PEFT or `lora_config.json` of PaddleNLP."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paddlemix_qwenvl_plugin.checkpoint.config import first_problem, read_json
from paddlemix_qwenvl_plugin.util.errors import QwenVLError

# Keys of LoRA variants that compute something other than W + scaling * B A with the base model's W.
_PEFT_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_PADDLENLP_VARIANTS = ("pissa", "loraga", "use_mora", "lora_use_mixer", "enable_lora_list", "do_qat")
# Initialisations that leave the base weights unchanged. The others (PiSSA, OLoRA, LoftQ, …) change the base weights,
# and an adapter does not store them.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class LoraConfig:
    """Rank and scaling of an adapter's low-rank updates.

    `rank_pattern` and `alpha_pattern`: values that override `rank` or `alpha` for some modules. A key is the last
    components of a module's name, such as `mlp.w1`, or `^` and its full name. `rslora`: the scaling is alpha /
    sqrt(rank). `modules_to_save`: modules that the adapter replaces completely. `base`: name of the model that the
    adapter was trained on.
    """

    path: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    base: Optional[str] = None

    def rank_of(self, module: str) -> int:
        """The rank of a module's update."""
        return _value_for(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        """The factor of a module's update B A: alpha / rank, with rsLoRA alpha / sqrt(rank)."""
        rank = self.rank_of(module)
        return _value_for(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


class _FiniteNumbers(BaseModel):
    """Settings without infinite numbers or NaN; other keys of the file are ignored."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Peft(_FiniteNumbers):
    peft_type: str = "LORA"
    r: int = Field(ge=1, le=1 << 16)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Optional[dict[str, int]] = None
    alpha_pattern: Optional[dict[str, float]] = None
    modules_to_save: Optional[list[str]] = None
    init_lora_weights: Union[bool, str, None] = True
    base_model_name_or_path: Optional[str] = None


class _PaddleNLP(_FiniteNumbers):
    r: int = Field(ge=1, le=1 << 16)
    lora_alpha: float
    rslora: bool = False
    tensor_parallel_degree: int = -1
    base_model_name_or_path: Optional[str] = None


def read_peft_config(path: Path) -> LoraConfig:
    """Read `adapter_config.json`.

    Raises:
        QwenVLError: the file is not JSON, a key is missing or invalid, or the adapter is not plain LoRA.
    """
    data = _read(path)
    config = _validated(_Peft, data, path)
    if config.peft_type.upper() != "LORA":
        raise QwenVLError(f"{path}: peft_type {config.peft_type} is not supported, only LORA")
    _refuse_variants(path, data, _PEFT_VARIANTS)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise QwenVLError(
            f"{path}: init_lora_weights {config.init_lora_weights!r} changed the base weights in training; save the "
            "adapter again with path_initial_model_for_weight_conversion"
        )
    return LoraConfig(
        path,
        config.r,
        config.lora_alpha,
        config.use_rslora,
        _literal_names(config.rank_pattern, path, "rank_pattern"),
        _literal_names(config.alpha_pattern, path, "alpha_pattern"),
        tuple(config.modules_to_save or ()),
        config.base_model_name_or_path or None,
    )


def read_paddlenlp_config(path: Path) -> LoraConfig:
    """Read `lora_config.json`.

    Raises:
        QwenVLError: the file is not JSON, a key is missing or invalid, the adapter is not plain LoRA, or it is split
            over several ranks.
    """
    data = _read(path)
    config = _validated(_PaddleNLP, data, path)
    _refuse_variants(path, data, _PADDLENLP_VARIANTS)
    if config.tensor_parallel_degree > 1:
        raise QwenVLError(
            f"{path}: the adapter is split over {config.tensor_parallel_degree} tensor-parallel ranks; save it again "
            "with merge_tensor_parallel=True"
        )
    return LoraConfig(
        path, config.r, config.lora_alpha, config.rslora, base=config.base_model_name_or_path or None
    )


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise QwenVLError(f"{path}: must be a JSON object")
    return data


Model = TypeVar("Model", bound=BaseModel)


def _validated(model: type[Model], data: dict[str, Any], path: Path) -> Model:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise QwenVLError(f"{path}: {first_problem(error)}") from error


def _refuse_variants(path: Path, data: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if data.get(key):
            raise QwenVLError(f"{path}: {key} is set; only plain LoRA is supported, not its variants")


def _literal_names(pattern: Optional[dict[str, Value]], path: Path, key: str) -> dict[str, Value]:
    """Return a pattern with unescaped keys.

    Raises:
        QwenVLError: a key is not a module name (PEFT allows regular expressions), or a rank is below 1.
    """
    names = {name.replace("\\.", "."): value for name, value in (pattern or {}).items()}
    for name, value in names.items():
        # Matching a regular expression from a file could take forever.
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise QwenVLError(f"{path}: {key}: {name!r} is a regular expression; list the modules by name")
        if key == "rank_pattern" and value < 1:
            raise QwenVLError(f"{path}: {key}: {name}: a rank must be at least 1")
    return names


def _value_for(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches a module, else `default`.

    A key matches if it is `^` and the module's full name, or the last components of the module's name.
    """
    for key, value in pattern.items():
        if key == f"^{module}" or f".{module}".endswith(f".{key}"):
            return value
    return default
