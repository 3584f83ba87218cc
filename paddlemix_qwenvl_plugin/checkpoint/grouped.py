"""A quantized linear weight as integers with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

# Largest group size of the engine's storage types; larger groups are stored as several with the same scale.
MAX_GROUP = 128


class GroupedMatrix(NamedTuple):
    """A quantized matrix: value[o, i] = scales[o, g] * (integers[o, i] - zeros[o, g]), g = i // group size.

    Attributes:
        integers: uint8 [out, in].
        scales, zeros: float16 [out, groups].
        order: int32 [in], the input that column i multiplies; None: input i.
    """

    integers: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16]
    order: Optional[NDArray[np.int32]]


def engine_group(group_size: int) -> int:
    """Group size in the engine, 32, 64 or 128, for a checkpoint's group size; -1 is one group of all inputs."""
    return group_size if group_size in (32, 64) else MAX_GROUP


def n_groups(n_in: int, group_size: int) -> int:
    """Number of groups in the checkpoint; the last one may be shorter."""
    return 1 if group_size == -1 else -(-n_in // group_size)


def repeated(per_group: NDArray[np.float16], n_in: int, group_size: int) -> NDArray[np.float16]:
    """Repeat values [out, groups] of a checkpoint with groups above 128 for the engine's smaller groups."""
    size = engine_group(group_size)
    starts = np.arange(0, n_in, size)
    return per_group[:, starts // (n_in if group_size == -1 else group_size)]


def unpack_words(
    words: NDArray[np.int32], bits: int, places: tuple[int, ...], axis: int
) -> NDArray[np.uint8]:
    """Unpack unsigned integers of `bits` bits from int32 words along `axis`.

    The k-th lowest `bits` bits of a word hold integer places[k] of its 32 // bits integers.
    """
    per_word = 32 // bits
    shape = list(words.shape)
    shape[axis] *= per_word
    values = np.empty(shape, np.uint8)
    unsigned = words.view(np.uint32)
    mask = np.uint32(2**bits - 1)
    for k, place in enumerate(places):
        part = (slice(place, None, per_word), slice(None))
        values[part if axis == 0 else part[::-1]] = (unsigned >> np.uint32(bits * k)) & mask
    return values
