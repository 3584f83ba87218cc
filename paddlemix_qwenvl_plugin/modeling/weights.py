"""From a checkpoint to the parameters of the modules here: the same values, the position tables resized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from einops import rearrange
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.checkpoint import Checkpoint
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.dtypes import cast
from paddlemix_qwenvl_plugin.modeling.language import LanguageModel
from paddlemix_qwenvl_plugin.modeling.vision import VisionModel
from paddlemix_qwenvl_plugin.progress import track

Parameters = Iterator[tuple[str, NDArray[np.generic]]]


def language_parameters(checkpoint: Checkpoint, dtype: str) -> Parameters:
    """(parameter name, values in storage type) of the language model."""
    return track(checkpoint.tensors(checkpoint.language, dtype), "language weights", len(checkpoint.language))


def vision_parameters(checkpoint: Checkpoint, dtype: str) -> Parameters:
    """(parameter name, values in storage type) of the vision tower and the resampler."""
    grid = checkpoint.config.visual.grid
    stream = checkpoint.tensors(checkpoint.vision, dtype)
    for name, values in track(stream, "vision weights", len(checkpoint.vision)):
        if name == "visual.positional_embedding":
            yield name, _resize(values, grid, dtype, name)
            continue
        yield name, values
        if name == "visual.attn_pool.pos_embed":
            yield "visual.attn_pool.key_pos_embed", _resize(values, grid, dtype, name)


def load_language(checkpoint: Checkpoint, dtype: str = "float32") -> LanguageModel:
    """The language model in dynamic mode, on Paddle's current device."""
    model: LanguageModel = _load(
        LanguageModel, checkpoint.config, language_parameters(checkpoint, dtype), dtype
    )
    return model


def load_vision(checkpoint: Checkpoint, dtype: str = "float32") -> VisionModel:
    """The vision tower in dynamic mode, on Paddle's current device."""
    model: VisionModel = _load(VisionModel, checkpoint.config, vision_parameters(checkpoint, dtype), dtype)
    return model


def build(model_class: Any, config: ModelConfig, dtype: str, compute_dtype: str) -> Any:
    """A model with parameters of `dtype`; Paddle's default dtype is left as it was."""
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        with paddle.utils.unique_name.guard():  # parameter names are unique within a model, not a process
            model = model_class(config, compute_dtype)
    finally:
        paddle.set_default_dtype(before)
    model.eval()
    return model


def _load(model_class: Any, config: ModelConfig, stream: Parameters, dtype: str) -> Any:
    model = build(model_class, config, dtype, dtype)
    parameters = {parameter.name: parameter for parameter in model.parameters()}
    for name, values in stream:
        parameters.pop(name).set_value(np.ascontiguousarray(values))
    if parameters:  # a slip of this package, not of the user's
        raise AssertionError(f"parameters without weights: {sorted(parameters)}")
    return model


def _resize(table: NDArray[np.generic], grid: int, dtype: str, name: str) -> NDArray[np.generic]:
    """Resize a square table of positions [n * n, width] to [grid * grid, width], bicubic, in float32."""
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
