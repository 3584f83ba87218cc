"""Picking a row's next token from its logits, in NumPy on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

# A forbidden token's logit, as upstream sets it.
_FORBIDDEN = -1e10


class RowSampler:
    """One row's options, what it has generated, and its own random generator."""

    def __init__(self, options: GenerationOptions, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self.options = options
        self.tokens: list[int] = []
        self.ended = False
        self._eos = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._counts = np.zeros(vocab_size, np.int32)
        self._random = np.random.default_rng(options.seed)

    @property
    def finished(self) -> bool:
        return self.ended or len(self.tokens) >= self.options.max_new_tokens

    @property
    def finish_reason(self) -> str:
        """ "stop": an end token; "length": as many tokens as asked for."""
        return "stop" if self.ended else "length"

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Take the next token from float32 logits [vocab_size] and remember it."""
        token = self._choose(self._adjust(logits))
        self.tokens.append(token)
        self._counts[token] += 1
        self.ended = token in self._eos
        return token

    def _adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        options, adjusted = self.options, logits.astype(np.float64)
        if len(self.tokens) < options.min_new_tokens:
            adjusted[self._eos] = _FORBIDDEN
        seen = np.flatnonzero(self._counts)
        if seen.size:
            values = adjusted[seen]
            values = np.where(
                values < 0, values * options.repetition_penalty, values / options.repetition_penalty
            )
            adjusted[seen] = (
                values - self._counts[seen] * options.frequency_penalty - options.presence_penalty
            )
        return adjusted

    def _choose(self, logits: NDArray[np.float64]) -> int:
        options = self.options
        if options.greedy:
            return int(logits.argmax())
        scaled = logits / (options.temperature or 1.0)
        # Stable, so that of equal logits the lower id comes first, as in argmax.
        order = np.argsort(-scaled, kind="stable")[: options.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        probabilities = weights / weights.sum()
        before = np.cumsum(probabilities) - probabilities
        kept = order[: int((before < (1.0 if options.top_p is None else options.top_p)).sum()) or 1]
        reach = np.cumsum(probabilities[: kept.size])
        index = np.searchsorted(reach, self._random.random() * reach[-1], side="right")
        return int(kept[min(int(index), kept.size - 1)])
