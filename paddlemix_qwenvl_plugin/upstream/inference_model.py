"""The class that PaddleNLP's scripts take for Qwen-VL's language model: they export it, or run it dynamically."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Optional

import paddle

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.errors import UsageError
from paddlemix_qwenvl_plugin.export.export import export_language
from paddlemix_qwenvl_plugin.modeling.generation import StockGeneration
from paddlemix_qwenvl_plugin.modeling.weights import load_language


class QWenForQWenVLInferenceModel:
    """A model folder and a dtype. Weights are read when they are needed: by `generate`, or streamed by `to_static`."""

    def __init__(self, folder: Path, config: Any, dtype: str) -> None:
        self.config = config
        self._folder = folder
        self._dtype = dtype
        self._generation: Optional[StockGeneration] = None

    @classmethod
    def from_pretrained(
        cls, path: str, config: Any = None, dtype: Optional[str] = None, **_: Any
    ) -> QWenForQWenVLInferenceModel:
        """Open a model folder; further arguments are about what upstream's own class would do."""
        if getattr(config, "weight_only_quant_bits", -1) > 0 or getattr(config, "quant_type", None):
            raise UsageError("--quant_type: not supported yet, export without it")
        folder = Path(path)
        Checkpoint(folder)  # says now what is wrong with the folder
        dtype = dtype or paddle.get_default_dtype()
        if dtype != "float32" and not paddle.is_compiled_with_cuda():
            _let_arange_make_half_numbers()
        return cls(folder, config, dtype)

    @classmethod
    def confirm_inference_model(cls, **_: Any) -> type[QWenForQWenVLInferenceModel]:
        """Generation 2 asks which class fits the device: this one does."""
        return cls

    @classmethod
    def set_inference_config(cls, **_: Any) -> None:
        """Generation 2 prepares the config for its own layers; nothing to do here."""

    @classmethod
    def get_cache_kvs_shape(
        cls, config: Any, max_batch_size: Optional[int] = None, max_length: Optional[int] = None
    ) -> list[list[Optional[int]]]:
        """[2, batch, heads, length, head_dim] of each layer, None for what is not known."""
        heads = config.num_attention_heads
        length = max_length if max_length is not None else config.max_position_embeddings
        shape = [2, max_batch_size, heads, length, config.hidden_size // heads]
        return [list(shape) for _ in range(config.num_hidden_layers)]

    def eval(self) -> QWenForQWenVLInferenceModel:
        """Nothing here trains."""
        return self

    def to_static(self, output_path: str, config: dict[str, Any]) -> None:
        """Export to OUTPUT_PATH.* as `qwenvl export-language` does."""
        prefix = Path(output_path)
        export_language(self._folder, prefix.parent, prefix.name, str(config.get("dtype") or self._dtype))
        _skip_upstream_validation()

    def generate(self, **inputs: Any) -> Any:
        """Upstream's dynamic predictor: the inputs of the stock graph, without pictures where they are not given."""
        if self._generation is None:
            self._generation = StockGeneration(load_language(Checkpoint(self._folder), self._dtype))
        hidden = self._generation.model.config.hidden_size
        queries = self._generation.model.config.visual.n_queries
        inputs.setdefault("image_features", paddle.zeros([1, queries, hidden], "float32"))
        inputs.setdefault("img_pos", paddle.to_tensor([[-1, 0, 0]], dtype="int64"))
        with paddle.no_grad():
            return self._generation(**inputs)


def _let_arange_make_half_numbers() -> None:
    """Upstream's predictor makes a range in the model's dtype, for which Paddle has no CPU kernel in half types."""
    arange = paddle.arange
    if getattr(arange, "_qwenvl", False):
        return

    def wrapped(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        if str(dtype).rpartition(".")[2] in ("float16", "bfloat16"):
            return arange(*args, dtype="float32", **kwargs).astype(dtype)
        return arange(*args, dtype=dtype, **kwargs)

    vars(wrapped)["_qwenvl"] = True
    paddle.arange = wrapped


def _skip_upstream_validation() -> None:
    """Upstream's script then looks for print operators, on a device type that Paddle does not know and in the legacy
    program only. The function is looked up in the script when it is called."""
    script = sys.modules["__main__"]
    if hasattr(script, "validate_pdmodel"):
        vars(script)["validate_pdmodel"] = lambda model_path, model_prefix, device: None
