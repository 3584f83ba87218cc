"""Language model class for PaddleNLP's scripts, which export it or run it dynamically."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import paddle

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.engine.quantize import check_quant_type
from paddlemix_qwenvl_plugin.export.export import export_language
from paddlemix_qwenvl_plugin.modeling.generation import StockGeneration
from paddlemix_qwenvl_plugin.modeling.weights import load_language
from paddlemix_qwenvl_plugin.runtime.real_time_save import write_tokens
from paddlemix_qwenvl_plugin.upstream.model_folder import model_folder
from paddlemix_qwenvl_plugin.upstream.patching import replace
from paddlemix_qwenvl_plugin.util.errors import UsageError
from paddlemix_qwenvl_plugin.util.notice import notice


class QWenForQWenVLInferenceModel:
    """Model class for PaddleNLP: `generate` loads the weights, `to_static` streams them into an export."""

    def __init__(self, folder: Path, config: Any, dtype: str, quant_type: Optional[str]) -> None:
        self.config = config
        self._folder = folder
        self._dtype = dtype
        self._quant_type = quant_type
        self._generation: Optional[StockGeneration] = None

    @classmethod
    def from_pretrained(
        cls, path: str, config: Any = None, dtype: Optional[str] = None, **_: Any
    ) -> QWenForQWenVLInferenceModel:
        """Open a model folder or a community name; upstream's further arguments are ignored.

        Raises:
            UsageError: the config requests an unsupported feature.
            QwenVLError: the model folder is invalid.
        """
        quant_type = check_quant_type(getattr(config, "quant_type", None) or None)
        if getattr(config, "tensor_parallel_degree", 1) > 1:
            raise UsageError("several processes: not supported, start the script on one device")
        folder = model_folder(str(path))
        Checkpoint(folder)  # fail early if the folder is invalid
        dtype = dtype or paddle.get_default_dtype()
        if dtype != "float32" and not paddle.is_compiled_with_cuda():
            replace(paddle, "arange", _arange_in_half_types)
        return cls(folder, config, dtype, quant_type)

    @classmethod
    def confirm_inference_model(cls, **_: Any) -> type[QWenForQWenVLInferenceModel]:
        """Return this class; PaddleNLP 3.0.0b4 calls this to select a class for the device."""
        return cls

    @classmethod
    def set_inference_config(
        cls, config: Any, predictor_args: Any, tensor_parallel_degree: int = 1, **_: Any
    ) -> None:
        """Copy command-line options of PaddleNLP 3.0.0b4 into the config, where from_pretrained reads them."""
        config.quant_type = getattr(predictor_args, "quant_type", None)
        config.tensor_parallel_degree = tensor_parallel_degree

    @classmethod
    def get_cache_kvs_shape(
        cls, config: Any, max_batch_size: Optional[int] = None, max_length: Optional[int] = None
    ) -> list[list[Optional[int]]]:
        """Cache shape of each layer: [2, max_batch_size, heads, length, head_dim]. An unknown batch size is None."""
        heads = config.num_attention_heads
        length = max_length if max_length is not None else config.max_position_embeddings
        shape = [2, max_batch_size, heads, length, config.hidden_size // heads]
        return [list(shape) for _ in range(config.num_hidden_layers)]

    @property
    def generation_config(self) -> Any:
        """Config that PaddleNLP 3.0.0b4 saves with an export if the folder has no generation_config.json."""
        from paddlenlp.generation import GenerationConfig

        return GenerationConfig.from_model_config(self.config)

    def eval(self) -> QWenForQWenVLInferenceModel:
        """Return self: the model has no training mode."""
        return self

    def to_static(self, output_path: str, config: dict[str, Any]) -> None:
        """Export to OUTPUT_PATH.* like `qwenvl export-language`.

        Raises:
            UsageError, QwenVLError: the config requests a prefix cache or an 8-bit cache; or see export_language.
        """
        if config.get("export_precache"):
            raise UsageError("--export_precache: not supported, export without it")
        for flag in ("use_cachekv_int8", "cachekv_int8_type"):  # of PaddleNLP 3.0.0b0, of 3.0.0b4
            if config.get(flag) not in (None, "None"):
                raise UsageError(f"8-bit caches ({flag}={config[flag]}): not supported, export without them")
        prefix = Path(output_path)
        dtype = str(config.get("dtype") or self._dtype)
        export_language(self._folder, prefix.parent, prefix.name, dtype, quant_type=self._quant_type)
        _skip_upstream_validation()

    def generate(self, **inputs: Any) -> Any:
        """Generate for upstream's dynamic predictor; write the tokens to the working directory, where it reads them.

        Args:
            inputs: inputs of the stock program by name; image_features and img_pos may be absent without images.

        Returns:
            Outputs of the stock program (StockGeneration in modeling/generation.py).

        Raises:
            UsageError: the inputs have prefix caches, or the config requests quantization.
            QwenVLError: the weights cannot be loaded.
        """
        if inputs.pop("pre_caches", None):
            raise UsageError("--export_precache: not supported, run without it")
        if self._quant_type:
            raise UsageError(f"--quant_type {self._quant_type}: only for an export, run without it")
        generation = self._load()
        config = generation.model.config
        inputs.setdefault(
            "image_features", paddle.zeros([1, config.visual.n_queries, config.hidden_size], "float32")
        )
        inputs.setdefault("img_pos", paddle.to_tensor([[-1, 0, 0]], dtype="int64"))
        # Upstream passes positions for prompt and completion together, and repeats the stop tokens for each row.
        inputs["position_ids"] = inputs["position_ids"][:, : inputs["input_ids"].shape[1]]
        inputs["eos_token_id"] = inputs["eos_token_id"].flatten()
        with paddle.no_grad():
            outputs = generation(**inputs)
        write_tokens(Path(), outputs[-1].numpy().tolist(), int(inputs["eos_token_id"][0]))
        return outputs

    def _load(self) -> StockGeneration:
        if self._generation is None:
            # On a CPU, Paddle lacks half-type kernels that the model needs.
            dtype = self._dtype if paddle.get_device().startswith("gpu") else "float32"
            self._generation = StockGeneration(load_language(Checkpoint(self._folder), dtype))
        return self._generation


def _arange_in_half_types(arange: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap paddle.arange for upstream's predictor, which calls it with half types, unsupported on a CPU."""

    def wrapped(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        if str(dtype).rpartition(".")[2] in ("float16", "bfloat16"):
            return arange(*args, dtype="float32", **kwargs).astype(dtype)
        return arange(*args, dtype=dtype, **kwargs)

    return wrapped


def _skip_upstream_validation() -> None:
    """Skip a check by the export script of PaddleNLP's generation 1 (pins.py).

    The check looks for print operators. It fails on a CPU, and on any device for programs in the format of Paddle 3.
    The script looks up the check's function only after the export, so a replacement set now takes effect.
    """
    script = sys.modules["__main__"]
    if hasattr(script, "validate_pdmodel"):
        replace(script, "validate_pdmodel", lambda _: _skipped_validation)


def _skipped_validation(model_path: str, model_prefix: str, device: str) -> None:
    notice("validate_pdmodel skipped: the export has no print operators, and the check fails on Paddle 3")
