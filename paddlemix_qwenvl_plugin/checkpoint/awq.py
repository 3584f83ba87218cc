"""Unpack a linear weight of AutoAWQ's "gemm" format, which auto-round writes as well.

For a linear layer with `in` inputs and `out` outputs, 4 bits:

| tensor | dtype, shape | content |
| --- | --- | --- |
| `qweight` | int32 [in, out / 8] | for each input, 8 outputs per word; from the low bits up: outputs 0 2 4 6 1 3 5 7 |
| `qzeros` | int32 [groups, out / 8] | zero points in the same order |
| `scales` | float16 [groups, out] | |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.grouped import GroupedMatrix, n_groups, repeated, unpack_words
from paddlemix_qwenvl_plugin.checkpoint.quant_config import QuantConfig

# The output in each 4-bit field of a word, from the low bits up.
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


def shapes(n_in: int, n_out: int, config: QuantConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the stored tensors of an AWQ linear layer, by suffix of the tensor name."""
    groups = n_groups(n_in, config.group_size)
    return {"qweight": (n_in, n_out // 8), "qzeros": (groups, n_out // 8), "scales": (groups, n_out)}


def unpack(tensors: Mapping[str, NDArray[Any]], config: QuantConfig) -> GroupedMatrix:
    """Unpack the stored tensors of an AWQ linear layer."""
    integers = unpack_words(tensors["qweight"], config.bits, _PLACES, axis=1).T
    zeros = unpack_words(tensors["qzeros"], config.bits, _PLACES, axis=1)
    n_in = integers.shape[1]
    # The engine's groups have at most 128 inputs: the scale and zero point of a larger group are repeated.
    return GroupedMatrix(
        integers,
        repeated(tensors["scales"].T, n_in, config.group_size),
        repeated(zeros.T.astype(np.float16), n_in, config.group_size),
        None,  # no act-order
    )
