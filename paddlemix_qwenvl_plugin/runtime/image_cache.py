"""Cache of image features by content."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

_MAX_BYTES = 256 * 2**20  # the features of 64 images of the 7B model


class ImageCache:
    """LRU cache of image features by image digest, of up to `max_bytes`."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        """The cached features of an image, float32 [n_queries, hidden_size]; None if absent."""
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: NDArray[np.float32]) -> None:
        """Add features and evict the least recently used; a single entry is kept even if it exceeds the limit."""
        if digest not in self._features:
            self._features[digest] = features
            self._n_bytes += features.nbytes
        while len(self._features) > 1 and self._n_bytes > self._max_bytes:
            _, dropped = self._features.popitem(last=False)
            self._n_bytes -= dropped.nbytes
