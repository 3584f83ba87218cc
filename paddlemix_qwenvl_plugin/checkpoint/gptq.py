"""Unpack a linear weight of AutoGPTQ's format, which GPTQModel and auto-round write as well.

For a linear layer with `in` inputs and `out` outputs:

| tensor | dtype, shape | content |
| --- | --- | --- |
| `qweight` | int32 [in * bits / 32, out] | for each output, consecutive inputs in a word; the first in the low bits |
| `qzeros` | int32 [groups, out * bits / 32] | zero points of consecutive outputs; in format "gptq" minus one |
| `scales` | float16 [groups, out] | |
| `g_idx` | int32 [in] | group of each input; absent: input // group size |

The format, "gptq" or "gptq_v2", is `checkpoint_format` of the quantizer's configuration. Zero points range from 0 to
2^bits - 1. In format "gptq", a zero point of 0 is stored as -1 modulo 2^bits, that is, as 2^bits - 1. This module
reads it as 0, like AutoGPTQ's CUDA kernels for 4 bits; other readers return 2^bits, which no quantizer produces. When
it writes, GPTQModel subtracts one from every zero point of an int32 word by a single subtraction, in which a zero point
of 0 borrows from the next zero point.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.grouped import GroupedMatrix, n_groups, repeated, unpack_words
from paddlemix_qwenvl_plugin.checkpoint.quant_config import QuantConfig
from paddlemix_qwenvl_plugin.util.errors import QwenVLError


def shapes(n_in: int, n_out: int, config: QuantConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors of a GPTQ linear layer, by suffix of the tensor name."""
    groups = n_groups(n_in, config.group_size)
    return {
        "qweight": (n_in * config.bits // 32, n_out),
        "qzeros": (groups, n_out * config.bits // 32),
        "scales": (groups, n_out),
        "g_idx": (n_in,),
    }


def unpack(tensors: Mapping[str, NDArray[Any]], config: QuantConfig, name: str) -> GroupedMatrix:
    """Unpack the stored tensors of a GPTQ linear layer and sort the inputs by group.

    Raises:
        QwenVLError: the groups of `g_idx` do not have the size in `config`.
    """
    places = tuple(range(32 // config.bits))
    integers = unpack_words(tensors["qweight"], config.bits, places, axis=0).T
    n_in = integers.shape[1]
    words = tensors["qzeros"]
    if config.zeros_minus_one and config.zeros_borrow:
        # Undo the subtraction, borrows included: add one to every zero point by one addition per word.
        one_per_field = sum(1 << (config.bits * place) for place in places)
        words = (words.view(np.uint32) + np.uint32(one_per_field)).view(np.int32)
    zeros = unpack_words(words, config.bits, places, axis=1)
    if config.zeros_minus_one and not config.zeros_borrow:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**config.bits - 1)
    order = sorted_inputs(tensors.get("g_idx"), n_in, config.group_size, name)
    # The engine's groups have at most 128 inputs: the scale and zero point of a larger group are repeated.
    return GroupedMatrix(
        integers if order is None else integers[:, order],
        repeated(tensors["scales"].T, n_in, config.group_size),
        repeated(zeros.T.astype(np.float16), n_in, config.group_size),
        order,
    )


def sorted_inputs(
    g_idx: Optional[NDArray[Any]], n_in: int, group_size: int, name: str
) -> Optional[NDArray[np.int32]]:
    """Return the input indices sorted by group, int32 [in]; None if they are already in that order.

    Raises:
        QwenVLError: the groups of `g_idx` have other sizes than `group_size`.
    """
    if g_idx is None:
        return None
    groups = n_groups(n_in, group_size)
    size = n_in if group_size == -1 else group_size
    expected = np.full(groups, size)
    expected[-1] = n_in - size * (groups - 1)
    if g_idx.min() < 0 or g_idx.max() >= groups or (np.bincount(g_idx, minlength=groups) != expected).any():
        raise QwenVLError(f"{name}.g_idx: not {groups} groups of {size} inputs; copy the checkpoint again")
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if (order == np.arange(n_in)).all() else order
