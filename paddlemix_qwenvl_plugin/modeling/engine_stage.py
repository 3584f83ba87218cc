"""Engine form of the stages: each is one engine operator (csrc/paddle/) that takes the weights as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from paddlemix_qwenvl_plugin.artifact.contract import stock_inputs
from paddlemix_qwenvl_plugin.artifact.weights import Weight
from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.checkpoint.dtypes import STORAGE
from paddlemix_qwenvl_plugin.engine.library import DTYPES, LANGUAGE, VISION
from paddlemix_qwenvl_plugin.engine.operators import call
from paddlemix_qwenvl_plugin.engine.quantize import packed_bytes
from paddlemix_qwenvl_plugin.modeling.layers import parameter_attr

# Stock inputs that the engine does not read: those that StockGeneration ignores, and position_ids, since every prompt
# begins at position 0. The operator takes the others, in stock order, without the caches at the end.
_UNREAD = ("attention_mask", "position_ids", "tgt_ids", "tgt_generation_mask", "pre_ids")


class EngineStage(nn.Layer):
    """Parameters of a stage, and the operator attributes that describe them.

    `compute_dtype`, an argument of all stages, is ignored: the engine chooses its compute type.

    Args:
        weights: weights of the stage by name; quantized weights and int32 vectors become uint8 parameters.
    """

    _stage = 0

    def __init__(self, config: ModelConfig, compute_dtype: str, *, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self._config = config
        for name, weight in weights.items():
            self.add_parameter(name.replace(".", "_"), self._parameter(name, weight))
        vision = config.visual
        self._attributes = {
            # Fields of qvl_config, in the order of csrc/paddle/ops.cc.
            "sizes": [
                *(self._stage, config.hidden_size, config.num_hidden_layers, config.num_attention_heads),
                *(config.head_dim, config.mlp_width, config.vocab_size, config.seq_length),
                *(config.max_position_embeddings, int(config.use_dynamic_ntk), int(config.use_logn_attn)),
                *(vision.image_size, vision.patch_size, vision.width, vision.layers, vision.heads),
                *(vision.mlp_width, vision.n_queries),
            ],
            "norm_epsilon": config.layer_norm_epsilon,
            "rotary_base": float(config.rotary_emb_base),
            "names": list(weights),
            "dtypes": [DTYPES[weight.dtype] for weight in weights.values()],
            # Four sizes per weight, padded with zeros.
            "shapes": [size for weight in weights.values() for size in (*weight.shape, 0, 0, 0)[:4]],
        }

    def _call(self, operator: str, inputs: dict[str, Any], outputs: tuple[str, ...]) -> list[Any]:
        return call(operator, {**inputs, "weights": self.parameters()}, self._attributes, outputs)

    def _parameter(self, name: str, weight: Weight) -> paddle.Tensor:
        if weight.dtype in STORAGE:  # the default dtype, which `build` (weights.py) sets
            return self.create_parameter(list(weight.shape), attr=parameter_attr(name))
        n_bytes = packed_bytes(weight.dtype, *weight.shape)
        return self.create_parameter([n_bytes], attr=parameter_attr(name), dtype="uint8")


class EngineVision(EngineStage):
    """Vision stage with the inputs and outputs of VisionModel."""

    _stage = VISION

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        """Images float32 [N, 3, image_size, image_size] -> features float32 [N, n_queries, hidden]."""
        return self._call("qwenvl_encode_images", {"images": images}, ("features",))[0]


class EngineGeneration(EngineStage):
    """Language stage as one operator: complete completions, with the inputs and outputs of StockGeneration."""

    _stage = LANGUAGE

    def forward(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        """Generate completions. Shapes and dtypes: artifact/contract.py."""
        # Only the names are read: the dtypes may be empty. The inputs after the 22nd are the caches.
        names = [declared.name for declared in stock_inputs(self._config, "", "")[:22]]
        read = {name: tensor for name, tensor in zip(names, inputs) if name not in _UNREAD}
        outputs = ("next_tokens", "steps", "stopped", "lengths", "positions", "tokens")
        return self._call("qwenvl_generate", read, outputs)
