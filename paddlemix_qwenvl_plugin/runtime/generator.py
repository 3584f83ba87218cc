"""Generation as a loop over the step program: prefill of a batch, then one token a row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.programs import Stage
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler


@dataclass
class Generated:
    """What came of a batch. Times are seconds; `finish_reasons` are "stop" (an end token) or "length"."""

    tokens: list[list[int]]
    finish_reasons: list[str]
    prefill_seconds: float
    decode_seconds: float
    steps: int = field(default=0)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens that B rows have run so far, in P slots.

    Attributes:
        tensors: keys and values of each layer in turn, each [B, heads, P, head_dim].
        valid: bool [B, P]; a slot may hold padding.
        lengths: int64 [B, 1], tokens of each row.
    """

    tensors: list[Any]
    valid: NDArray[np.bool_]
    lengths: NDArray[np.int64]

    def first(self, n_tokens: int) -> KVCache:
        """The cache of the first `n_tokens` of a single row that was run without padding."""
        slots = 1 + n_tokens  # the first slot is never valid: see Generator.empty_cache
        # Contiguous: a slice is a view with strides, which Paddle Inference does not heed when it is fed one.
        tensors = [tensor[:, :, :slots].contiguous() for tensor in self.tensors]
        return KVCache(tensors, self.valid[:, :slots], np.full_like(self.lengths, n_tokens))


class Generator:
    """The language stage with its step program opened."""

    def __init__(self, stage: Stage) -> None:
        self.config: ModelConfig = stage.manifest.config
        self._dtype = stage.compute_dtype
        self._program = stage.open(".step")

    def generate(
        self,
        input_ids: NDArray[np.int64],
        lengths: Sequence[int],
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        options: GenerationOptions,
        eos_token_ids: Sequence[int],
    ) -> Generated:
        """Generate for checked arguments; see `steps`."""
        start = prefilled = time.perf_counter()
        samplers = self.samplers(len(input_ids), options, eos_token_ids)
        n_steps = 0
        for n_steps, _ in enumerate(self.steps(input_ids, lengths, features, img_pos, samplers), start=1):
            if n_steps == 1:
                prefilled = time.perf_counter()
        return Generated(
            [sampler.tokens for sampler in samplers],
            [sampler.finish_reason for sampler in samplers],
            prefilled - start,
            time.perf_counter() - prefilled,
            n_steps,
        )

    def samplers(
        self, n_rows: int, options: GenerationOptions, eos_token_ids: Sequence[int]
    ) -> list[RowSampler]:
        """A sampler for each row of a batch."""
        return [RowSampler(options, eos_token_ids, self.config.vocab_size) for _ in range(n_rows)]

    def steps(
        self,
        input_ids: NDArray[np.int64],
        lengths: Sequence[int],
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        samplers: Sequence[RowSampler],
        cache: KVCache | None = None,
    ) -> Iterator[KVCache]:
        """Prefill, then decode until every sampler has finished. Whoever stops iterating frees the request.

        Args:
            input_ids: int64 [B, T], rows padded on the right: the prompts, or what follows `cache` of them.
            lengths: length of each row, 1 to T.
            features: float32 [N, n_queries, hidden]; N may be 0.
            img_pos: int64 [N, 3]: row, index of `<img>` and of `</img>` in input_ids.
            samplers: one a row; each has one more token after each step, unless it has finished.
            cache: of what comes before input_ids.

        Yields:
            The cache of all tokens but the newest.
        """
        rows = len(input_ids)
        row_lengths = np.asarray(lengths, np.int64).reshape(rows, 1)
        if cache is None:
            cache = self.empty_cache(rows)
        prompt = cache.lengths + row_lengths
        if not len(features):
            features, img_pos = self._no_picture()
        logits, cache = self._forward(input_ids, features, img_pos, row_lengths, prompt, cache)
        tokens = self._pick(logits, samplers, np.zeros([rows, 1], np.int64))
        yield cache
        features, img_pos = self._no_picture()
        one = np.ones([rows, 1], np.int64)
        while not all(sampler.finished for sampler in samplers):
            logits, cache = self._forward(tokens, features, img_pos, one, prompt, cache)
            tokens = self._pick(logits, samplers, tokens)
            yield cache

    def empty_cache(self, rows: int) -> KVCache:
        """The cache of no tokens: a program cannot be fed an empty tensor, so it has one slot that is not valid."""
        shape = [rows, self.config.num_attention_heads, 1, self.config.head_dim]
        tensors = [self._program.zeros(shape, self._dtype) for _ in range(2 * self.config.num_hidden_layers)]
        return KVCache(tensors, np.zeros([rows, 1], bool), np.zeros([rows, 1], np.int64))

    def _forward(
        self,
        ids: NDArray[np.int64],
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        lengths: NDArray[np.int64],
        prompt: NDArray[np.int64],
        cache: KVCache,
    ) -> tuple[NDArray[np.float32], KVCache]:
        """One run of the step program: logits of each row's last token, and the longer cache."""
        feed = [ids, features, img_pos, lengths, cache.lengths, prompt, cache.valid, *cache.tensors]
        logits, *tensors = self._program(feed)
        valid = np.concatenate([cache.valid, np.arange(ids.shape[1]) < lengths], axis=1)
        return logits.numpy(), KVCache(tensors, valid, cache.lengths + lengths)

    def _pick(
        self, logits: NDArray[np.float32], samplers: Sequence[RowSampler], previous: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Next token of each row; a finished row repeats its last one, which nothing reads."""
        picked = [
            int(previous[row, 0]) if sampler.finished else sampler.pick(logits[row])
            for row, sampler in enumerate(samplers)
        ]
        return np.asarray(picked, np.int64).reshape(-1, 1)

    def _no_picture(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        shape = (1, self.config.visual.n_queries, self.config.hidden_size)
        return np.zeros(shape, np.float32), np.array([[-1, 0, 0]], np.int64)
