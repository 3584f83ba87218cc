"""The KV cache of the portable step program: tensors that go in and come out longer (artifact/contract.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.runtime.kv_cache import Chunks
from paddlemix_qwenvl_plugin.runtime.programs import Program


@dataclass(frozen=True)
class PortableCache:
    """Keys and values in P slots.

    Attributes:
        tensors: keys and values of each layer in turn, each [B, heads, P, head_dim].
        valid: bool [B, P]; a slot may hold padding.
        lengths: int64 [B, 1], tokens of each row.
    """

    program: Program
    config: ModelConfig
    tensors: list[Any]
    valid: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    @classmethod
    def empty(cls, program: Program, config: ModelConfig, n_rows: int, dtype: str) -> PortableCache:
        """The cache of no tokens: a program cannot be fed an empty tensor, so it has one slot that is not valid."""
        shape = [n_rows, config.num_attention_heads, 1, config.head_dim]
        tensors = [program.zeros(shape, dtype) for _ in range(2 * config.num_hidden_layers)]
        return cls(program, config, tensors, np.zeros([n_rows, 1], bool), np.zeros([n_rows, 1], np.int64))

    def first(self, n_tokens: int) -> PortableCache:
        """See KVCache; the row was run without padding."""
        slots = 1 + n_tokens  # the first slot is never valid
        # Contiguous: a slice is a view with strides, which Paddle Inference does not heed when it is fed one.
        tensors = [tensor[:, :, :slots].contiguous() for tensor in self.tensors]
        lengths = np.full_like(self.lengths, n_tokens)
        return PortableCache(self.program, self.config, tensors, self.valid[:, :slots], lengths)

    def run(
        self,
        chunks: Chunks,
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        prompt_lengths: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], PortableCache]:
        """See KVCache. A row without tokens is run on one of padding."""
        # Padding is looked up in the embedding table, so it must be a token.
        ids = np.zeros([len(chunks), max(map(len, chunks))], np.int64)
        for row, chunk in zip(ids, chunks):
            row[: len(chunk)] = chunk
        lengths = np.array([[max(1, len(chunk))] for chunk in chunks], np.int64)
        if not len(features):
            features = np.zeros([1, self.config.visual.n_queries, self.config.hidden_size], np.float32)
            img_pos = np.array([[-1, 0, 0]], np.int64)
        feed = [ids, features, img_pos, lengths, self.lengths, prompt_lengths, self.valid, *self.tensors]
        logits, *tensors = self.program(feed)
        valid = np.concatenate([self.valid, np.arange(ids.shape[1]) < lengths], axis=1)
        return logits.numpy(), PortableCache(
            self.program, self.config, tensors, valid, self.lengths + lengths
        )
