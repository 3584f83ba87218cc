"""Quantization of a stage's weights for the engine (csrc/include/qwenvl.h, `qvl_dtype`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.tensors import TensorSpec
from paddlemix_qwenvl_plugin.engine.library import DTYPES, call, load
from paddlemix_qwenvl_plugin.util.errors import QwenVLError, UsageError

QUANT_TYPES = ("weight_only_int8", "weight_only_int4")

# Quantization types of quantized checkpoints, such as gptq_int4_g128_order: bits, group size, whether columns are
# sorted by group.
_CHECKPOINT_TYPE = re.compile(r"(?:gptq|awq)_int([48])_g(32|64|128)(_order)?")
ORDER = ".order"
"""Name suffix of a weight's input order, int32 [in]: column j of the stored weight multiplies input order[j]."""

# Ends of the names of the matrices that weight_only_int4 stores in 8 bits.
_EIGHT_BITS = ("lm_head.weight", "attn.c_attn.weight")


def check_quant_type(quant_type: Optional[str]) -> Optional[str]:
    """Return `quant_type` if it is one of QUANT_TYPES or None; otherwise raise UsageError."""
    if quant_type is not None and quant_type not in QUANT_TYPES:
        raise UsageError(f"--quant_type {quant_type}: must be one of {', '.join(QUANT_TYPES)}")
    return quant_type


def quantized(specs: Mapping[str, TensorSpec], quant_type: Optional[str]) -> dict[str, str]:
    """The storage types of the quantized weights: name -> key of library.DTYPES.

    `quant_type`: one of QUANT_TYPES, or the type of a quantized checkpoint.

    weight_only_int4 stores lm_head and attention's c_attn in 8 bits: of the matrices other than lm_head, c_attn costs
    the most accuracy at 4 bits (figures in docs/demo-model.md). Quantized checkpoints have lm_head in floating point.
    """
    if quant_type is None:
        return {}
    linear = [name for name, spec in specs.items() if spec.linear]
    match = _CHECKPOINT_TYPE.fullmatch(quant_type)
    if match:
        kind = f"uint{match[1]}_g{match[2]}"
        return {name: kind for name in linear if name != "lm_head.weight"}
    if quant_type == "weight_only_int8":
        return dict.fromkeys(linear, "int8")
    return {name: "int8" if name.endswith(_EIGHT_BITS) else "int4_g64" for name in linear}


def has_order(quant_type: Optional[str]) -> bool:
    """Whether each quantized weight NAME is accompanied by NAME + ORDER, the order of its inputs."""
    match = _CHECKPOINT_TYPE.fullmatch(quant_type or "")
    return match is not None and match[3] is not None


def packed_bytes(kind: str, n_out: int, n_in: int = 1) -> int:
    """Size in bytes of a quantized matrix [n_out, n_in], or of an int32 vector [n_out]."""
    return int(load().qvl_packed_bytes(DTYPES[kind], n_out, n_in))


def pack(kind: str, values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    """Quantize a matrix [out, in] to `kind`, a symmetric storage type of the engine such as int8.

    Raises:
        QwenVLError: a value is not finite; the message begins with `name`.
    """
    values = np.ascontiguousarray(values)
    packed = np.empty(packed_bytes(kind, *values.shape), np.uint8)
    try:
        call("qvl_pack", DTYPES[kind], *values.shape, values.ctypes.data, packed.ctypes.data, packed.nbytes)
    except QwenVLError as error:
        raise QwenVLError(f"{name}: {error}") from error
    return packed


def pack_groups(
    kind: str,
    integers: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zeros: NDArray[np.float16],
    name: str,
) -> NDArray[np.uint8]:
    """Pack a matrix that is already quantized; value = scale * (integer - zero), without any rounding.

    Args:
        kind: "uint4_g32" to "uint8_g128" (library.DTYPES).
        integers: [out, in], below 16 for 4 bits.
        scales, zeros: [out, groups] with groups = ceil(in / group size); zeros are integers from 0 to 256.
        name: the weight's name, for messages.

    Raises:
        QwenVLError: an integer, scale or zero point is out of range; the message begins with `name`.
    """
    group_size = int(kind.rpartition("_g")[2])
    n_out, n_in = integers.shape
    n_groups = -(-n_in // group_size)
    for array, dtype, shape in (
        (integers, np.uint8, (n_out, n_in)),
        (scales, np.float16, (n_out, n_groups)),
        (zeros, np.float16, (n_out, n_groups)),
    ):
        if array.dtype != dtype or array.shape != shape:  # internal invariant violated
            raise AssertionError(f"{name}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
    packed = np.empty(packed_bytes(kind, n_out, n_in), np.uint8)
    arrays = [np.ascontiguousarray(array) for array in (integers, scales, zeros)]
    pointers = [array.ctypes.data for array in arrays]
    try:
        call("qvl_pack_groups", DTYPES[kind], n_out, n_in, *pointers, packed.ctypes.data, packed.nbytes)
    except QwenVLError as error:
        raise QwenVLError(f"{name}: {error}") from error
    return packed
