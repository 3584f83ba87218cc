"""Inputs of the exported programs: names, order, shapes and dtypes. In a shape, -1 is any size.

Every function takes the dtypes of the parameters (`dtype`) and of the activations (`compute_dtype`), even if no input
depends on them: export/program.py calls all of them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig

CONTRACT_VERSION = 3
# The supported versions. Version 2 has the same portable programs, but parameter files without names and alignment.
CONTRACT_VERSIONS = (2, 3)


@dataclass(frozen=True)
class Input:
    """Name, shape and dtype of a program's input."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def vision_inputs(config: ModelConfig, dtype: str, compute_dtype: str) -> list[Input]:
    """Inputs of the vision stage: images in float32, for models of any dtype."""
    size = config.visual.image_size
    return [Input("images", (-1, 3, size, size), "float32")]


def stock_inputs(config: ModelConfig, dtype: str, compute_dtype: str) -> list[Input]:
    """Inputs of the language stage as PaddleMIX's stock predictor feeds it: 22 inputs, then a cache per layer.

    attention_mask is declared with 2 axes, but the stock scripts feed it with 4; both are accepted. img_pos: see
    LanguageModel.embed.
    """
    cache = (2, -1, config.num_attention_heads, -1, config.head_dim)
    return [
        Input("input_ids", (-1, -1), "int64"),
        Input("image_features", (-1, -1, -1), "float32"),
        Input("img_pos", (-1, 3), "int64"),
        Input("attention_mask", (-1, -1), dtype),
        Input("position_ids", (-1, -1), "int64"),
        Input("penalty_score", (-1, 1), "float32"),
        Input("frequency_score", (-1, 1), "float32"),
        Input("presence_score", (-1, 1), "float32"),
        Input("min_length", (-1, 1), "int64"),
        Input("max_length", (-1, 1), "int64"),
        Input("temperature", (-1, 1), "float32"),
        Input("top_p", (-1, 1), "float32"),
        Input("eos_token_id", (-1,), "int64"),
        Input("seq_len_encoder", (-1, 1), "int32"),
        Input("seq_len_decoder", (-1, 1), "int32"),
        Input("step_idx", (-1, 1), "int64"),
        Input("stop_flags", (-1, 1), "bool"),
        Input("tgt_ids", (-1, 1), "int64"),
        Input("tgt_pos", (-1, 1), "int64"),
        Input("tgt_generation_mask", (-1, 1, 1, -1), dtype),
        Input("pre_ids", (-1, -1), "int64"),
        Input("stop_nums", (1,), "int64"),
        *(Input(f"cache_kvs_{i}", cache, dtype) for i in range(config.num_hidden_layers)),
    ]


def step_inputs(config: ModelConfig, dtype: str, compute_dtype: str) -> list[Input]:
    """Inputs of the portable step program: for each row, new tokens after a cache of at least one position.

    See modeling/generation.py. Paddle Inference does not accept empty tensors: an empty cache is one position with
    cache_valid False, and a step without images has one image with a negative row in img_pos.
    """
    cache = (-1, config.num_attention_heads, -1, config.head_dim)
    return [
        Input("input_ids", (-1, -1), "int64"),
        Input("image_features", (-1, -1, -1), "float32"),
        Input("img_pos", (-1, 3), "int64"),
        Input("seq_len", (-1, 1), "int64"),
        Input("past_len", (-1, 1), "int64"),
        Input("prompt_len", (-1, 1), "int64"),
        Input("cache_valid", (-1, -1), "bool"),
        *(
            Input(f"cache_{part}_{i}", cache, compute_dtype)
            for i in range(config.num_hidden_layers)
            for part in ("k", "v")
        ),
    ]
