"""Sampling of the portable executor, in NumPy, with the engine's semantics (qvl_sampling in csrc/include/qwenvl.h)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.generation import TokenLogprobs
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

# Logit of a forbidden token, as in upstream.
_FORBIDDEN = -1e10


class RowSampler:
    """Sampler of one request: sampling parameters, number and counts of its generated tokens, and seed."""

    def __init__(
        self,
        options: GenerationOptions,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        tokens: Sequence[int] = (),
    ) -> None:
        """Create a sampler for a request that has generated `tokens` so far."""
        self._options = options
        self._stop_token_ids = [token for token in stop_token_ids if 0 <= token < vocab_size]
        self._counts = np.bincount(tokens, minlength=vocab_size) if tokens else np.zeros(vocab_size, np.int64)
        self._n_tokens = len(tokens)
        self._seed = random.SystemRandom().getrandbits(64) if options.seed is None else options.seed

    def pick(self, logits: NDArray[np.float32]) -> int:
        """Pick the next token from finite float32 logits [vocab_size] and count it."""
        token = self._choose(self._adjust(logits))
        self._counts[token] += 1
        self._n_tokens += 1
        return token

    def _adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        options, adjusted = self._options, logits.astype(np.float64)
        if self._n_tokens < options.min_new_tokens:
            adjusted[self._stop_token_ids] = _FORBIDDEN
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
        options = self._options
        if options.greedy:
            return int(logits.argmax())
        scaled = logits / (options.temperature or 1.0)
        # Stable: of equal logits the lower id is first, as in argmax.
        order = np.argsort(-scaled, kind="stable")[: options.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        probabilities = weights / weights.sum()
        # Top-p keeps a token if the more likely tokens together have less than top_p, so the first one always:
        # top_p is positive, since 0 is greedy.
        more_likely = np.cumsum(probabilities) - probabilities
        top_p = 1.0 if options.top_p is None else options.top_p
        n_kept = int((more_likely < top_p).sum())
        kept = order[:n_kept]
        cumulative = np.cumsum(probabilities[: kept.size])
        drawn = random_fraction(self._seed, self._n_tokens) * cumulative[-1]
        index = np.searchsorted(cumulative, drawn, side="right")
        return int(kept[min(int(index), kept.size - 1)])


def log_probabilities(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """Log probabilities of a token and of the n_top most likely tokens under float32 logits [vocab_size]."""
    logprobs = logits.astype(np.float64)
    logprobs -= logprobs.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    top = np.argsort(-logprobs, kind="stable")[:n_top]
    return TokenLogprobs(float(logprobs[token]), tuple(zip(top.tolist(), logprobs[top].tolist())))


def random_fraction(seed: int, counter: int) -> float:
    """The random number with index `counter` of a seed, in [0, 1): splitmix64, as in the engine."""
    mask = 2**64 - 1
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return float((z ^ z >> 31) >> 11) * 2.0**-53
