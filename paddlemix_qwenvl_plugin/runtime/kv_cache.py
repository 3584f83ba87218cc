"""What the generation loop knows of a KV cache: portable_cache.py and engine_cache.py have the two kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Chunks = Sequence[NDArray[np.int64]]
"""The next token ids of each row; none for a row that is not to be run."""


class KVCache(Protocol):
    """Keys and values of the tokens that B rows have run so far."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, [B, 1]."""

    def first(self, n_tokens: int) -> KVCache:
        """The cache of the first `n_tokens` of a single row. Once it has grown, this one is not to be used again."""

    def run(
        self,
        chunks: Chunks,
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        prompt_lengths: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], KVCache]:
        """One pass of the model over what comes next.

        Args:
            chunks: see Chunks.
            features: float32 [N, n_queries, hidden], of the pictures in the chunks.
            img_pos: int64 [N, 3]: row, index of `<img>` and of `</img>` in the row's chunk.
            prompt_lengths: int64 [B, 1], of the whole prompts.

        Returns:
            float32 logits [B, vocab_size] of each row's last token, of any value for a row that was not run; and the
            longer cache.
        """
