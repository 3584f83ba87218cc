"""The fused body of both stages: one operator of the engine (csrc/paddle/), with the weights as its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.engine.operators import call
from paddlemix_qwenvl_plugin.engine.quantize import CODES, packed_bytes
from paddlemix_qwenvl_plugin.modeling.layers import parameter_attr

_VISION, _LANGUAGE = 1, 2

# What the engine reads of the 22 stock inputs, in the order of the operator (the others: see StockGeneration).
_STOCK_PLACES = {
    "input_ids": 0,
    "image_features": 1,
    "img_pos": 2,
    "penalty_score": 5,
    "frequency_score": 6,
    "presence_score": 7,
    "min_length": 8,
    "max_length": 9,
    "temperature": 10,
    "top_p": 11,
    "eos_token_id": 12,
    "seq_len_encoder": 13,
    "seq_len_decoder": 14,
    "step_idx": 15,
    "stop_flags": 16,
    "tgt_pos": 18,
    "stop_nums": 21,
}

Shapes = Mapping[str, tuple[int, ...]]


class FusedStage(nn.Layer):
    """Weights, and the attributes in which an operator says which is which.

    What it computes in is the engine's affair, not `compute_dtype`'s.

    Args:
        shapes: of the weights as values, matrices [out, in].
        dtype: how they are stored.
        quantised: those that are stored as "int8" or "int4_g64" instead, as bytes.
    """

    _stage = 0

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: str,
        *,
        shapes: Shapes,
        dtype: str,
        quantised: Mapping[str, str],
    ) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.add_parameter(name.replace(".", "_"), self._weight(name, shape, quantised.get(name)))
        vision = config.visual
        self._attributes = {
            "sizes": [
                *(self._stage, config.hidden_size, config.num_hidden_layers, config.num_attention_heads),
                *(config.head_dim, config.mlp_width, config.vocab_size, config.seq_length),
                *(config.max_position_embeddings, int(config.use_dynamic_ntk), int(config.use_logn_attn)),
                *(vision.image_size, vision.patch_size, vision.width, vision.layers, vision.heads),
                *(vision.mlp_width, vision.n_queries),
            ],
            "norm_epsilon": config.layer_norm_epsilon,
            "rotary_base": float(config.rotary_emb_base),
            "names": list(shapes),
            "dtypes": [CODES[quantised.get(name, dtype)] for name in shapes],
            "shapes": [n for shape in shapes.values() for n in (*shape, 0, 0, 0)[:4]],
        }

    def _call(self, operator: str, inputs: dict[str, Any], outputs: tuple[str, ...]) -> list[Any]:
        return call(operator, {**inputs, "weights": self.parameters()}, self._attributes, outputs)

    def _weight(self, name: str, shape: tuple[int, ...], kind: str | None) -> paddle.Tensor:
        if kind is None:
            return self.create_parameter(list(shape), attr=parameter_attr(name))
        n_out, n_in = shape
        return self.create_parameter(
            [packed_bytes(kind, n_out, n_in)], attr=parameter_attr(name), dtype="uint8"
        )


class FusedVision(FusedStage):
    """Stage 1, with the inputs and outputs of VisionModel."""

    _stage = _VISION

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return self._call("qwenvl_encode_images", {"images": images}, ("features",))[0]


class FusedGeneration(FusedStage):
    """Stage 2 in one run, with the inputs and outputs of StockGeneration."""

    _stage = _LANGUAGE

    def forward(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        read = {name: inputs[place] for name, place in _STOCK_PLACES.items()}
        outputs = ("next_tokens", "steps", "stopped", "lengths", "positions", "tokens")
        return self._call("qwenvl_generate", read, outputs)


class FusedForward(FusedStage):
    """One pass over a packed batch, with the engine's paged KV cache (artifact/contract.py)."""

    _stage = _LANGUAGE

    def forward(self, *inputs: paddle.Tensor) -> paddle.Tensor:
        names = ("tokens", "features", "spans", "sequences", "blocks", "pool")
        return self._call("qwenvl_forward", dict(zip(names, inputs)), ("logits",))[0]
