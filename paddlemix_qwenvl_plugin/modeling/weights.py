"""Load the layers' parameters from a checkpoint.

An export streams them. load_language, for upstream/inference_model.py, and load_vision, for quantization/embedding.py,
load them into a model, as tests do. The layout is that of the engine (csrc/include/qwenvl.h): matrices [out, in],
position tables resized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Optional

import numpy as np
import paddle
from einops import rearrange
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.artifact.weights import TABLES
from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast
from paddlemix_qwenvl_plugin.engine.quantize import ORDER, has_order, pack, pack_groups
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.vision import VisionModel
from paddlemix_qwenvl_plugin.util.progress import track

Parameters = Iterator[tuple[str, NDArray[np.generic]]]


def language_parameters(
    checkpoint: Checkpoint, dtype: str, quantized: Optional[Mapping[str, str]] = None
) -> Parameters:
    """Yield (parameter name, values in the storage type) of the language model.

    `quantized`: name -> quantized storage type (engine/quantize.py). If the checkpoint stores these weights as
    integers, the integers are only repacked.
    """
    kinds = quantized or {}
    unquantized = {name: spec for name, spec in checkpoint.language.items() if name not in kinds}
    packed = _repack(checkpoint, kinds) if checkpoint.quantized else _quantize(checkpoint, kinds)
    stream = chain(checkpoint.tensors(unquantized, dtype, out_in=True), packed)
    with_order = checkpoint.quantized is not None and has_order(checkpoint.quantized.quant_type)
    total = len(checkpoint.language) + (len(kinds) if with_order else 0)
    return track(stream, "language weights", total)


def _quantize(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Parameters:
    specs = {name: spec for name, spec in checkpoint.language.items() if name in kinds}
    for name, values in checkpoint.tensors(specs, "float32", out_in=True):
        yield name, pack(kinds[name], np.asarray(values, np.float32), name)


def _repack(checkpoint: Checkpoint, kinds: Mapping[str, str]) -> Parameters:
    """Stream the packed matrices of a quantized checkpoint, each followed by its input order if the type has orders."""
    quantized = checkpoint.quantized
    assert quantized is not None
    for name, kind in kinds.items():
        matrix = quantized.read(name)
        yield name, pack_groups(kind, matrix.integers, matrix.scales, matrix.zeros, name)
        if has_order(quantized.quant_type):
            n_in = matrix.integers.shape[1]
            # Every matrix of such a type needs an order: the identity if its columns are in order already.
            order = np.arange(n_in, dtype=np.int32) if matrix.order is None else matrix.order
            yield name + ORDER, order.view(np.uint8)


def vision_parameters(checkpoint: Checkpoint, dtype: str) -> Parameters:
    """Yield (parameter name, values in the storage type) of the vision transformer and the resampler."""
    grid = checkpoint.config.visual.grid
    stream = checkpoint.tensors(checkpoint.vision, dtype, out_in=True)
    for name, values in track(stream, "vision weights", len(checkpoint.vision)):
        if name not in TABLES:
            # `out_in` applies to linear weights, not to `proj`, which all naming schemes store as [in, out].
            yield name, np.ascontiguousarray(values.T) if name == "visual.proj" else values
        # TABLES: resized table -> table of the checkpoint. `pos_embed` itself has been yielded above, unresized.
        for table, source in TABLES.items():
            if source == name:
                yield table, _resize(values, grid, dtype, name)


def load_language(checkpoint: Checkpoint, dtype: str = "float32") -> LanguageModel:
    """Load the language model in dynamic mode, on Paddle's current device."""
    model: LanguageModel = _load(
        LanguageModel, checkpoint.config, language_parameters(checkpoint, dtype), dtype
    )
    return model


def load_vision(checkpoint: Checkpoint, dtype: str = "float32") -> VisionModel:
    """Load the vision model in dynamic mode, on Paddle's current device."""
    model: VisionModel = _load(VisionModel, checkpoint.config, vision_parameters(checkpoint, dtype), dtype)
    return model


def build(model_class: Any, config: ModelConfig, dtype: str, compute_dtype: str) -> Any:
    """Create a model with parameters of `dtype`; Paddle's default dtype is restored."""
    previous_dtype = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with paddle.utils.unique_name.guard():  # parameter names are unique within a model, not a process
            model = model_class(config, compute_dtype)
    finally:
        paddle.set_default_dtype(previous_dtype)
    model.eval()
    return model


def _load(model_class: Any, config: ModelConfig, stream: Parameters, dtype: str) -> Any:
    model = build(model_class, config, dtype, dtype)
    parameters = {parameter.name: parameter for parameter in model.parameters()}
    for name, values in stream:
        parameters.pop(name).set_value(np.ascontiguousarray(values))
    if parameters:
        raise AssertionError(f"internal invariant violated: parameters without weights: {sorted(parameters)}")
    return model


def _resize(table: NDArray[np.generic], grid: int, dtype: str, name: str) -> NDArray[np.generic]:
    """Resize a position table [n * n, width] to [grid * grid, width], bicubic, in float32."""
    side = int(table.shape[0] ** 0.5)
    if side == grid:
        return table
    values = rearrange(cast(table, dtype, "float32", name), "(h w) c -> 1 c h w", h=side)
    with paddle.no_grad():
        resized = paddle.nn.functional.interpolate(
            paddle.to_tensor(np.ascontiguousarray(values), place=paddle.CPUPlace()),
            size=(grid, grid),
            mode="bicubic",
            align_corners=False,
        )
    return cast(rearrange(resized.numpy(), "1 c h w -> (h w) c"), "float32", dtype, name)
