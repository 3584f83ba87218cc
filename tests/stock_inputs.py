"""Inputs of the stock program as PaddleMIX's stock predictor feeds them: 22 inputs and a cache per layer."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_LEN = 1024  # positions in the caches, as PaddleMIX's predictor allocates them


def stock_feed(
    config: dict[str, Any],
    input_ids: np.ndarray,
    features: np.ndarray,
    img_pos: np.ndarray,
    max_new: int,
    *,
    lengths: list[int] | None = None,
    min_new: int = 0,
    stop_ids: list[int] | None = None,
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    mask_axes: int = 4,
) -> list[np.ndarray]:
    """Inputs for greedy completions of a batch of prompts, in the order of `stock_inputs` in artifact/contract.py.

    Inputs that the program does not read contain arbitrary values, as upstream's do.

    Args:
        lengths: length of each prompt in tokens; default: the width of `input_ids`.
        penalties: repetition, frequency and presence penalty.
        mask_axes: 4 for a causal attention mask, as the stock scripts feed it; 2 as the program declares it.
    """
    rows, width = input_ids.shape
    random = np.random.default_rng(5)
    length = np.array([[n] for n in lengths or [width] * rows])

    def column(value: Any, dtype: str) -> np.ndarray:
        return np.full([rows, 1], value, dtype)

    mask = np.zeros([rows, 1, MAX_LEN, MAX_LEN], np.float32)
    mask[:, 0, :width, :width] = np.tril(np.ones([width, width]))
    cache = [2, rows, config["num_attention_heads"], MAX_LEN, config["kv_channels"]]
    return [
        # input_ids, image_features, img_pos, attention_mask, position_ids
        input_ids.astype("int64"),
        features,
        img_pos,
        mask if mask_axes == 4 else np.ones([rows, MAX_LEN], np.float32),
        np.tile(np.arange(width, dtype="int64"), [rows, 1]),
        # penalty_score, frequency_score, presence_score, min_length, max_length, temperature, top_p, eos_token_id
        *(column(value, "float32") for value in penalties),
        column(min_new, "int64"),
        column(max_new, "int64"),
        column(1.0, "float32"),
        column(0.0, "float32"),
        np.array(stop_ids or [-1], "int64"),
        # seq_len_encoder, seq_len_decoder, step_idx, stop_flags
        length.astype("int32"),
        length.astype("int32"),
        column(0, "int64"),
        column(False, "bool"),
        # tgt_ids, tgt_pos, tgt_generation_mask, pre_ids, stop_nums
        column(-123, "int64"),
        length.astype("int64") - 1,
        np.ones([rows, 1, 1, MAX_LEN], np.float32),
        np.full([rows, MAX_LEN], -100, "int64"),
        np.array([rows], "int64"),
        *(random.random(cache, np.float32) for _ in range(config["num_hidden_layers"])),
    ]
