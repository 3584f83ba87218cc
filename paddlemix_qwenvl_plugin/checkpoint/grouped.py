"""A quantized linear weight as integers with a scale and a zero point for each group of inputs."""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

# Largest group size of the engine's storage types; a larger group is stored as several groups with the same scale and
# zero point.
_MAX_GROUP = 128


class GroupedMatrix(NamedTuple):
    """A quantized matrix: value[o, i] = scales[o, g] * (integers[o, i] - zeros[o, g]), g = i // group size.

    The groups are the engine's (see engine_group), which may be smaller than the checkpoint's.

    Attributes:
        integers: uint8 [out, in].
        scales, zeros: float16 [out, groups].
        order: int32 [in], for each column i the input that it multiplies; None: column i multiplies input i.
    """

    integers: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.float16]
    order: Optional[NDArray[np.int32]]


def engine_group(group_size: int) -> int:
    """Group size in the engine, 32, 64 or 128, for a checkpoint's: 32, 64, a multiple of 128, or -1 (all inputs)."""
    return group_size if group_size in (32, 64) else _MAX_GROUP


def n_groups(n_in: int, group_size: int) -> int:
    """Number of the checkpoint's groups that `n_in` inputs form; the last group may be smaller."""
    return 1 if group_size == -1 else -(-n_in // group_size)


def repeated(per_group: NDArray[np.float16], n_in: int, group_size: int) -> NDArray[np.float16]:
    """Repeat the values of a checkpoint's groups, [out, groups], for the engine's groups of at most 128 inputs."""
    size = engine_group(group_size)
    starts = np.arange(0, n_in, size)
    return per_group[:, starts // (n_in if group_size == -1 else group_size)]


def unpack_words(
    words: NDArray[np.int32], bits: int, places: tuple[int, ...], axis: int
) -> NDArray[np.uint8]:
    """Unpack unsigned integers of `bits` bits from int32 words along `axis`.

    A word has 32 // bits fields, numbered from the low bits up; field k holds the word's integer places[k].
    """
    per_word = 32 // bits
    shape = list(words.shape)
    shape[axis] *= per_word
    values = np.empty(shape, np.uint8)
    unsigned = words.view(np.uint32)
    mask = np.uint32(2**bits - 1)
    for k, place in enumerate(places):
        strided = (slice(place, None, per_word), slice(None))
        values[strided if axis == 0 else strided[::-1]] = (unsigned >> np.uint32(bits * k)) & mask
    return values
