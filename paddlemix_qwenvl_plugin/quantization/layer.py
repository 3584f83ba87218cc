"""A decoder layer in float32 that also computes the inputs of each of its matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.modeling.language import Layer, Position, chunk_mask
from paddlemix_qwenvl_plugin.modeling.weights import build

Floats = NDArray[np.float32]

# Stages: matrices that share an input, in the order of the forward pass. The inputs of the first two stages follow
# from the states before the layer, those of the last two from the states after the layer's attention.
STAGES: tuple[tuple[str, ...], ...] = (
    ("attn.c_attn",),
    ("attn.c_proj",),
    ("mlp.w1", "mlp.w2"),
    ("mlp.c_proj",),
)


class DecoderLayer:
    """A decoder layer, computed in parts; `load` sets its weights.

    LayerQuantizer has two: the original layer, and one whose matrices it replaces by their quantized values.
    `n_prompt` of its methods is the length of a row's prompt, which determines the rotary base.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._layer: Layer = build(lambda conf, _: Layer("h", conf), config, "float32", "float32")
        self._parameters = {parameter.name: parameter for parameter in self._layer.parameters()}

    def load(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        """Replace weights, float32, matrices as [out, in], by name without the layer's prefix."""
        for name, values in weights.items():
            self._parameters[f"h.{name}"].set_value(np.ascontiguousarray(values))

    def inputs(self, stage: int, states: Floats, n_prompt: int) -> Floats:
        """Compute the input [tokens, in] of the matrices STAGES[stage], one of four sets that each have the same input.

        Args:
            states: states before the layer for stages 0 and 1, after the layer's attention for stages 2 and 3.
        """
        layer, x = self._layer, paddle.to_tensor(states[None])
        with paddle.no_grad():
            if stage == 0:
                inputs = layer.ln_1(x)
            elif stage == 1:
                inputs, _ = layer.attn.mix(layer.ln_1(x), self._position(len(states), n_prompt), None)
            elif stage == 2:
                inputs = layer.ln_2(x)
            else:
                inputs = layer.gate(layer.ln_2(x))
        return np.asarray(inputs.numpy()[0], np.float32)

    def after_attention(self, states: Floats, n_prompt: int) -> Floats:
        """Compute the states after the attention from those before the layer, both [tokens, hidden]."""
        layer, x = self._layer, paddle.to_tensor(states[None])
        with paddle.no_grad():
            mixed, _ = layer.attn(layer.ln_1(x), self._position(len(states), n_prompt), None)
            return np.asarray((x + mixed).numpy()[0], np.float32)

    def after_mlp(self, states: Floats) -> Floats:
        """Compute the states after the layer from those after its attention, both [tokens, hidden]."""
        layer, x = self._layer, paddle.to_tensor(states[None])
        with paddle.no_grad():
            return np.asarray((x + layer.c_proj(layer.gate(layer.ln_2(x)))).numpy()[0], np.float32)

    def _position(self, n_tokens: int, n_prompt: int) -> Position:
        positions = paddle.arange(n_tokens, dtype="int64").unsqueeze(0)
        length = paddle.full([1, 1], n_prompt, "int64")
        return Position(positions, length, chunk_mask(positions, None), self._config)
