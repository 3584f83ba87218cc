"""Features of pictures seen before, by content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_MAX_BYTES = 256 * 2**20


class FeatureCache:
    """The features of the pictures used last, up to `max_bytes` of them."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(
        self, pixels: NDArray[np.float32], encode: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """The features of a picture, float32 [n_queries, H], encoded unless they are there.

        Args:
            pixels: float32 [3, size, size], contiguous.
            encode: called without arguments.
        """
        key = hashlib.sha256(pixels.data).digest()
        if key not in self._features:
            self._features[key] = encode()
        self._features.move_to_end(key)
        features = self._features[key]
        while len(self._features) > 1 and self._n_bytes() > self._max_bytes:
            self._features.popitem(last=False)
        return features

    def _n_bytes(self) -> int:
        return sum(features.nbytes for features in self._features.values())
