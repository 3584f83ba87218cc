"""The model's `config.json`, validated: its sizes and options; JSON readers, also for other files.

The upper bounds, 4 times Qwen-VL's values or more, only reject damaged files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

RESAMPLER_HEAD_DIM = 128  # upstream's resampler has output_dim // 128 heads
MAX_JSON_BYTES = 16 << 20


class VisionConfig(BaseModel):
    """Sizes of the vision tower and the resampler, and the id of `<img>` (`visual` in config.json)."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    image_size: int = Field(default=448, ge=1, le=4096)
    patch_size: int = Field(default=14, ge=1, le=1024)
    width: int = Field(default=1664, ge=1, le=65536)
    layers: int = Field(default=48, ge=1, le=1024)
    heads: int = Field(default=16, ge=1, le=1024)
    mlp_ratio: float = Field(default=4.9231, gt=0, le=64)
    output_dim: int = Field(default=4096, ge=1, le=65536)
    n_queries: int = Field(default=256, ge=1, le=65536)
    image_start_id: int = Field(default=151857, ge=0)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @model_validator(mode="after")
    def _consistent(self) -> VisionConfig:
        _require(self.image_size % self.patch_size == 0, "image_size must be a multiple of patch_size")
        _require(self.grid <= 128, "image_size must be at most 128 x patch_size")
        _require(self.mlp_width >= 1, "width x mlp_ratio must be at least 1")
        _require(self.width % self.heads == 0, "width must be a multiple of heads")
        _require(
            self.output_dim % RESAMPLER_HEAD_DIM == 0,
            f"output_dim must be a multiple of {RESAMPLER_HEAD_DIM}",
        )
        _require(
            int(self.n_queries**0.5) ** 2 == self.n_queries,
            "n_queries must be a square, it lies on a 2-D grid",
        )
        return self


class ModelConfig(BaseModel):
    """Sizes and options of the model. Keys of config.json that only upstream uses are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    hidden_size: int = Field(ge=1, le=65536)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: int = Field(ge=1, le=1024)
    intermediate_size: int = Field(ge=1, le=1 << 20)
    vocab_size: int = Field(ge=1, le=1 << 22)
    kv_channels: int = Field(default=128, ge=1, le=512)
    layer_norm_epsilon: float = Field(default=1e-6, gt=0, lt=1)
    seq_length: int = Field(default=2048, ge=2, le=1 << 20)
    max_position_embeddings: int = Field(default=8192, ge=1, le=1 << 20)
    rotary_emb_base: float = Field(default=10000, gt=1, le=1e9)
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    # Whether the checkpoint stores wte and lm_head as one tensor. Excluded from fingerprints and manifests.
    tie_word_embeddings: bool = Field(default=False, exclude=True)
    visual: VisionConfig

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels

    @property
    def mlp_width(self) -> int:
        """Width of the gated MLP: half of `intermediate_size`, which counts gate and value together."""
        return self.intermediate_size // 2

    @property
    def max_ntk_doublings(self) -> int:
        """Number of thresholds of `ntk_doublings`: up to the first >= max_position_embeddings, but at least two.

        0 without dynamic NTK. Exported graphs compare the prompt's length with each threshold.
        """
        ratio = max(2, self.max_position_embeddings / self.seq_length)
        return math.ceil(math.log2(ratio)) + 1 if self.use_dynamic_ntk else 0

    def ntk_doublings(self, n_tokens: int) -> int:
        """Number of the thresholds seq_length x 1, 2, 4, … below a prompt's length; determines the rotary base.

        The engine computes the same (csrc/core/rotary.cc).
        """
        return sum(n_tokens > self.seq_length * 2**k for k in range(self.max_ntk_doublings))

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        _require(
            self.num_attention_heads * self.kv_channels == self.hidden_size,
            "num_attention_heads x kv_channels must equal hidden_size",
        )
        _require(self.kv_channels % 2 == 0, "kv_channels must be even (rotary embedding)")
        _require(self.rotary_pct == 1.0, "rotary_pct must be 1.0: Qwen-VL rotates the whole head")
        _require(self.intermediate_size % 2 == 0, "intermediate_size must be even")
        _require(self.visual.output_dim == self.hidden_size, "visual.output_dim must equal hidden_size")
        _require(
            self.visual.image_start_id + 2 < self.vocab_size,
            "visual.image_start_id + 2 (the image padding token) must be below vocab_size",
        )
        return self


def load_config(folder: Path) -> ModelConfig:
    """Read and validate `config.json` of a model folder.

    Raises:
        UsageError: the folder or the file does not exist.
        QwenVLError: the file cannot be read as JSON, or a size is missing or invalid; the message names the key.
    """
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent}: no such model folder")
    if not path.is_file():
        raise UsageError(f"{path.parent}: no config.json in it; is it a model folder?")
    return parse_config(read_json(path), str(path))


def is_chat_model(folder: Path) -> bool:
    """Whether the folder of a model, or of an exported stage, is of a chat model.

    A chat model has "chat_format": "chatml" in generation_config.json.

    Raises:
        QwenVLError: the file exists and cannot be read as JSON.
    """
    path = Path(folder) / "generation_config.json"
    data = read_json(path) if path.is_file() else None
    return isinstance(data, dict) and data.get("chat_format") == "chatml"


def read_json(path: Path, unique: bool = False) -> Any:
    """Read a JSON file; raise QwenVLError, which names the file, if it cannot be read or parsed, or is very large.

    Args:
        unique: refuse objects with a duplicate key, of which Python would keep the last value.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:  # parsed JSON can take 50 times its size in memory
            raise QwenVLError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB")
        return parse_json(path.read_bytes(), unique)
    except OSError as error:
        raise QwenVLError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # includes invalid UTF-8 and excessive nesting
        raise QwenVLError(f"{path}: not valid JSON ({error})") from error


def parse_json(text: bytes, unique: bool) -> Any:
    """Parse UTF-8 JSON, without duplicate keys if `unique`; raise ValueError or RecursionError if it is invalid."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates if unique else None)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key} is listed twice")
        content[key] = value
    return content


def parse_config(data: Any, origin: str) -> ModelConfig:
    """Validate the content of a config file; raise QwenVLError, which names the file `origin`, if it is invalid."""
    if not isinstance(data, dict):
        raise QwenVLError(f"{origin}: must be a JSON object")
    if "visual" not in data:
        raise QwenVLError(f"{origin}: no 'visual' section; this is not a Qwen-VL model")
    try:
        return ModelConfig.model_validate(data)
    except ValidationError as error:
        raise QwenVLError(f"{origin}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """Format pydantic's first validation error as one line, `key: problem (and N more)`."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    n_more = len(error.errors()) - 1
    line = f"{where}: {message}" if where else message
    return f"{line} (and {n_more} more)" if n_more else line


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
