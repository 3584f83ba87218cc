"""A request in the loop: its tokens, its images, how far it has come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.digest import digest_of

# Added to the id of a token whose keys and values have the arithmetic of a decode step (qwenvl.h), so that a cached
# block is found again only where recomputing it would give the same bits.
_GENERATED = 1 << 32

MAX_LOGPROBS = 20
"""How many of the likeliest tokens a request may ask for beside each of its own."""


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities under the unchanged logits.

    Attributes:
        logprob: of the token that was picked.
        top: (token id, log probability) of the likeliest ones, the likeliest first, the lower id first of equals.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class ImageInput:
    """An image of a prompt.

    Attributes:
        digest: of what the vision tower is given; images with the same digest have the same features.
        pixels: float32 [3, image_size, image_size] from `preprocess`, or uint8 [image_size, image_size, 3] from
            `resize`, contiguous; None where `features` are given.
        features: float32 [n_queries, hidden_size], once they are known.
        slots: [start, end) of its tokens in the prompt.
    """

    digest: bytes
    pixels: Optional[NDArray[Any]] = None
    features: Optional[NDArray[np.float32]] = None
    slots: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, pixels: NDArray[Any]) -> ImageInput:
        """An image still to be encoded."""
        return cls(digest_of(pixels), pixels)

    @classmethod
    def encoded(cls, features: NDArray[np.float32]) -> ImageInput:
        """An image whose features are known."""
        return cls(hashlib.sha256(b"features" + digest_of(features)).digest(), None, features)


class Generation:
    """A request from its submission to its last token.

    Attributes:
        prompt: token ids.
        tokens: the generated token ids, the stop token included.
        n_total: tokens of the prompt and generated ones.
        n_logprobs: None: no log probabilities; else how many of the likeliest tokens come with each token.
        logprobs: those of `tokens`, where `n_logprobs` asks for them.
        n_computed: how many of prompt + tokens have their keys and values in `blocks`.
        n_cached: tokens of the prompt that were found in the prefix cache when it first ran; None before.
        finish_reason: "stop", "length" or "cancelled"; None while it runs.
        error: what ended it instead; raised where its tokens are read.
        encode_seconds, prefill_seconds, decode_seconds: time of the steps that it took part in.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        images: Sequence[ImageInput],
        stop_token_ids: Sequence[int],
        options: GenerationOptions,
        generated: Sequence[tuple[int, int]] = (),
        rotary_class: int = 0,
        n_logprobs: Optional[int] = None,
    ) -> None:
        """Args:
        images: in the order of their slots, which do not overlap.
        generated: [start, end) ranges of the prompt that decode steps of earlier requests computed.
        rotary_class: what the rotary base of this prompt depends on (ModelConfig.ntk_doublings).
        """
        self.prompt = list(prompt)
        self.images = list(images)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.options = options
        self.tokens: list[int] = []
        self.n_logprobs = n_logprobs
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: Optional[str] = None
        self.error: Optional[BaseException] = None
        self.encode_seconds = self.prefill_seconds = self.decode_seconds = 0.0

        self.n_total = len(self.prompt)
        self.n_computed = 0
        self.n_cached: Optional[int] = None
        self.blocks: list[int] = []
        self._boundaries = sorted({edge for span in generated for edge in span})
        self._generated = sorted(generated)
        self._identity = self._identities()
        self._block_keys: list[bytes] = []
        self._chain = hashlib.sha256(b"qwenvl %d" % rotary_class).digest()

    @property
    def n_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; at least 1 while it runs."""
        return self.n_total - self.n_computed

    @property
    def decoding(self) -> bool:
        """Whether its next step runs its newest token alone."""
        return self.n_total - self.n_computed == 1 and bool(self.tokens)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, token: int, logprobs: Optional[TokenLogprobs] = None) -> None:
        """Add the token that a step gave."""
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.tokens.append(token)
        self.n_total += 1
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.options.max_new_tokens:
            self.finish_reason = "length"

    def ids(self, start: int, end: int) -> list[int]:
        """Tokens start to end of prompt + tokens."""
        n = len(self.prompt)
        if start >= n:
            return self.tokens[start - n : end - n]
        return self.prompt[start:end] if end <= n else [*self.prompt[start:], *self.tokens[: end - n]]

    def entries(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """[start, end) in parts that are wholly in the arithmetic of a prompt or (True) of a decode step."""
        n = len(self.prompt)
        edges = [start, *(edge for edge in self._boundaries if start < edge < end)]
        if start < n < end:
            edges.append(n)
        edges.append(end)
        return [(a, b, a >= n or self._in_generated(a)) for a, b in zip(edges, edges[1:])]

    def block_keys(self, n_blocks: int, block_tokens: int) -> list[bytes]:
        """The keys of the first n_blocks full blocks: a hash chain over tokens, images and the rotary base."""
        while len(self._block_keys) < n_blocks:
            start = len(self._block_keys) * block_tokens
            end = start + block_tokens
            n = len(self.prompt)
            content = self._identity[start:end].tobytes()
            if end > n:
                tail = [token + _GENERATED for token in self.tokens[max(0, start - n) : end - n]]
                content += np.array(tail, np.int64).tobytes()
            digests = [
                image.digest for image in self.images if image.slots[0] < end and start < image.slots[1]
            ]
            self._chain = hashlib.sha256(b"".join([self._chain, content, *digests])).digest()
            self._block_keys.append(self._chain)
        return self._block_keys[:n_blocks]

    def reset(self) -> None:
        """Forget what was computed, as when its blocks are given to others."""
        self.n_computed = 0
        self.blocks = []

    def _in_generated(self, position: int) -> bool:
        return any(start <= position < end for start, end in self._generated)

    def _identities(self) -> NDArray[np.int64]:
        """For each token of the prompt what its keys and values depend on: its id, or its place in its image."""
        identity = np.array(self.prompt, np.int64)
        for start, end in self._generated:
            identity[start:end] += _GENERATED
        for image in self.images:
            start, end = image.slots
            identity[start:end] = -1 - np.arange(end - start)
        return identity
