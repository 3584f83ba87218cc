"""The KV cache of the fused step program: blocks of a pool that the engine keeps (csrc/include/qwenvl.h)."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.engine.operators import load
from paddlemix_qwenvl_plugin.engine.quantize import CODES
from paddlemix_qwenvl_plugin.runtime.kv_cache import Chunks
from paddlemix_qwenvl_plugin.runtime.programs import Program

_BLOCK_TOKENS = 32

# Features and spans of no picture: the program cannot be fed empty tensors.
_NO_FEATURES, _NO_SPANS = np.zeros([1, 1, 1], np.float32), np.array([[0, -1]], np.int32)

_ids = itertools.count(1)


class Pool:
    """A pool of the engine, made at its first use and freed with this object.

    Args:
        n_rows: rows that share it; each has the same number of blocks, one after another.
        n_tokens: room of each row. Memory is taken as it is filled.
        dtype: of keys and values, float32 or bfloat16.

    Attributes:
        tables: int32 [n_rows, blocks of a row].
        described: what the program is told about it.
    """

    def __init__(self, n_rows: int, n_tokens: int, dtype: str) -> None:
        blocks_per_row = -(-n_tokens // _BLOCK_TOKENS)
        self.tables = np.arange(n_rows * blocks_per_row, dtype=np.int32).reshape(n_rows, blocks_per_row)
        identity = next(_ids)
        self.described = np.array([identity, self.tables.size, _BLOCK_TOKENS, CODES[dtype]], np.int64)
        weakref.finalize(self, load().qwenvl_free_pool, identity)


@dataclass(frozen=True)
class EngineCache:
    """The first `lengths` tokens of each row in a pool. See KVCache."""

    program: Program
    pool: Pool
    lengths: NDArray[np.int64]

    @classmethod
    def empty(cls, program: Program, n_rows: int, n_tokens: int, dtype: str) -> EngineCache:
        """The cache of no tokens, with room for `n_tokens` a row."""
        pool = Pool(n_rows, n_tokens, "float32" if dtype == "float32" else "bfloat16")
        return cls(program, pool, np.zeros([n_rows, 1], np.int64))

    def first(self, n_tokens: int) -> EngineCache:
        """See KVCache: what comes later is overwritten where it lies."""
        return EngineCache(self.program, self.pool, np.full_like(self.lengths, n_tokens))

    def run(
        self,
        chunks: Chunks,
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        prompt_lengths: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], EngineCache]:
        """See KVCache. Rows without tokens cost nothing."""
        n_new = np.array([len(chunk) for chunk in chunks], np.int64)
        rows = np.flatnonzero(n_new)
        past = self.lengths[:, 0]
        per_row = self.pool.tables.shape[1]
        if (past + n_new).max() > per_row * _BLOCK_TOKENS:  # a slip of this package, not of the user's
            raise AssertionError(f"{(past + n_new).max()} tokens in a pool for {per_row * _BLOCK_TOKENS}")
        sequences = np.stack(
            [n_new[rows], past[rows], prompt_lengths[rows, 0], np.full(len(rows), per_row)], axis=1
        )
        starts = np.cumsum(n_new) - n_new
        if len(features):
            spans = np.stack([starts[img_pos[:, 0]] + img_pos[:, 1] + 1, np.arange(len(img_pos))], axis=1)
            spans = spans[np.argsort(spans[:, 0])]
        else:
            features, spans = _NO_FEATURES, _NO_SPANS
        [found] = self.program(
            [
                np.concatenate(chunks).astype(np.int32),
                features,
                spans.astype(np.int32),
                sequences.astype(np.int32),
                self.pool.tables[rows].reshape(-1),
                self.pool.described,
            ]
        )
        logits = found.numpy()
        if len(rows) < len(chunks):
            spread = np.zeros([len(chunks), logits.shape[1]], np.float32)
            spread[rows] = logits
            logits = spread
        return logits, EngineCache(self.program, self.pool, self.lengths + n_new[:, None])
