"""Pack a quantized matrix into the tensors of a GPTQ checkpoint.

Source: AutoGPTQ's `pack` (format "gptq", often called v1). An int32 word holds 32 / bits integers, the first in the
lowest bits:

| tensor | shape | content |
| --- | --- | --- |
| `qweight` | int32 [in * bits / 32, out] | integers, packed along the inputs |
| `qzeros` | int32 [groups, out * bits / 32] | zero points minus 1, packed along the outputs |
| `scales` | float16 [groups, out] | |
| `g_idx` | int32 [in] | group of each input |
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.quantization.grid import Quantized


def gptq_tensors(matrix: Quantized, bits: int) -> dict[str, NDArray[np.generic]]:
    """Pack a quantized matrix into its GPTQ tensors, by suffix of the tensor name."""
    n_in = matrix.integers.shape[1]
    return {
        "qweight": _pack(matrix.integers.T, bits),
        "qzeros": np.ascontiguousarray(_pack(matrix.zeros - 1, bits).T),
        "scales": np.ascontiguousarray(matrix.scales.T.astype(np.float16)),
        "g_idx": (np.arange(n_in) // matrix.group).astype(np.int32),
    }


def _pack(integers: NDArray[np.float32], bits: int) -> NDArray[np.int32]:
    """Pack a matrix [n, m] along its first axis into words [n * bits / 32, m]."""
    per_word = 32 // bits
    words = integers.astype(np.uint32).reshape(-1, per_word, integers.shape[1])
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(words << shifts, axis=1)).view(np.int32)
