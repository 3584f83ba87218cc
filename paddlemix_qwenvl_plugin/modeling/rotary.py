"""Rotary embedding with dynamic NTK scaling, and logn scaling of the query.

Source of the formulas: the official Qwen-VL code. Values i and i + d / 2 are rotated as a pair, d being head_dim. The
NTK factor alpha, which enlarges the rotary base, depends only on the prompt's length, so that it is fixed for a
request. These are the formulas of portable graphs; the engine computes the same in csrc/core/rotary.cc.
"""

from __future__ import annotations

import math

import numpy as np
import paddle

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.modeling import ops


def ntk_alpha(prompt_len: paddle.Tensor, config: ModelConfig) -> paddle.Tensor:
    """NTK factor max(1, 2^ceil(log2(L / seq_length) + 1) - 1), float32 in the shape of `prompt_len` (integer).

    L is the prompt's length. Without `use_dynamic_ntk`, the factor is 1. The exponent is computed as 1 plus the number
    of powers of two (1, 2, 4, …) below L / seq_length: comparisons of integers are exact, unlike a rounded logarithm.
    """
    if not config.use_dynamic_ntk:
        return paddle.ones_like(prompt_len, dtype="float32")
    exponent = paddle.ones_like(prompt_len, dtype="float32")
    length = prompt_len.astype("int64")
    for k in range(config.max_ntk_doublings):
        exponent = exponent + (length > config.seq_length * 2**k).astype("float32")
    return paddle.pow(paddle.full_like(exponent, 2.0), exponent) - 1.0


def rotary_tables(
    positions: paddle.Tensor, prompt_len: paddle.Tensor, config: ModelConfig
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Cosine and sine tables, each float32 [B, S, 1, head_dim].

    base = rotary_emb_base * alpha^(d / (d - 2)); the angle of pair i at position p is p * base^(-2i / d).

    Args:
        positions: int64 [B, S], 0-based.
        prompt_len: integer [B, 1], prompt length of each request in tokens.
    """
    dim = config.head_dim
    exponents = paddle.to_tensor(np.arange(0, dim, 2, dtype=np.float32) / dim)
    alpha = ntk_alpha(prompt_len, config)
    # If dim is 2, the only exponent is 0, and any base will do.
    base = config.rotary_emb_base * paddle.pow(alpha, dim / (dim - 2)) if dim > 2 else alpha
    inverse = 1.0 / paddle.pow(base, exponents.unsqueeze(0))
    angles = positions.astype("float32").unsqueeze(-1) * inverse.unsqueeze(1)
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)
    return ops.cos(angles), ops.sin(angles)


def rotate(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Rotate float32 [B, S, heads, head_dim] by the tables of `rotary_tables`."""
    first, second = paddle.split(x, 2, axis=-1)
    return x * cos + paddle.concat([-second, first], axis=-1) * sin


def query_scale(positions: paddle.Tensor, config: ModelConfig) -> paddle.Tensor:
    """Query scale logn / sqrt(head_dim), float32 [B, S, 1, 1].

    logn is 1 for a 0-based position p with p + 1 <= seq_length, or without `use_logn_attn`, else
    log(p + 1) / log(seq_length).
    """
    scale = 1.0 / math.sqrt(config.head_dim)
    if not config.use_logn_attn:
        return paddle.full_like(positions, scale, dtype="float32").unsqueeze(-1).unsqueeze(-1)
    logn = ops.log(positions.astype("float32") + 1.0) / math.log(config.seq_length)
    return (paddle.clip(logn, min=1.0) * scale).unsqueeze(-1).unsqueeze(-1)
