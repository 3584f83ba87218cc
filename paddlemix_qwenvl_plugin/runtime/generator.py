"""Generation as a loop over the step program: prefill of a batch, then one token a row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.checkpoint.config import ModelConfig
from paddlemix_qwenvl_plugin.runtime.engine_cache import EngineCache
from paddlemix_qwenvl_plugin.runtime.kv_cache import Chunks, KVCache
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.portable_cache import PortableCache
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


class Generator:
    """The language stage with its step program opened."""

    def __init__(self, stage: Stage) -> None:
        self.config: ModelConfig = stage.manifest.config
        self._dtype = stage.compute_dtype
        self._fused = stage.fused
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
        chunks = [row[:length] for row, length in zip(input_ids, lengths)]
        if cache is None:
            longest = max(lengths) + max(sampler.options.max_new_tokens for sampler in samplers)
            cache = self.empty_cache(rows, longest)
        prompt = cache.lengths + np.asarray(lengths, np.int64).reshape(rows, 1)
        while True:
            logits, cache = self._forward(chunks, features, img_pos, prompt, cache)
            chunks = [_next(sampler, row) for sampler, row in zip(samplers, logits)]
            yield cache
            if not any(map(len, chunks)):
                return
            features, img_pos = features[:0], img_pos[:0]

    def empty_cache(self, n_rows: int, n_tokens: int) -> KVCache:
        """The cache of no tokens, with room for `n_tokens` a row."""
        if self._fused:
            return EngineCache.empty(self._program, n_rows, n_tokens, self._dtype)
        return PortableCache.empty(self._program, self.config, n_rows, self._dtype)

    def _forward(
        self,
        chunks: Chunks,
        features: NDArray[np.float32],
        img_pos: NDArray[np.int64],
        prompt: NDArray[np.int64],
        cache: KVCache,
    ) -> tuple[NDArray[np.float32], KVCache]:
        return cache.run(chunks, features, img_pos, prompt)


def _next(sampler: RowSampler, logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """What a row runs next, [1] or [0]: its new token, unless it has finished."""
    if not sampler.finished:
        token = sampler.pick(logits)
        if not sampler.finished:
            return np.array([token], np.int64)
    return np.zeros(0, np.int64)
