"""State of a request in the loop: tokens, images, KV cache blocks, progress."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.digest import digest_of

# Added, in block keys, to the id of a token whose keys and values a decode step computed (qwenvl.h). Decode steps and
# prefill round differently, and a cached block may only be reused where recomputing it would give the same bits.
_GENERATED = 1 << 32

MAX_LOGPROBS = 20
"""Maximum number of most likely tokens reported per generated token."""


class TokenLogprobs(NamedTuple):
    """Log probabilities (natural) of a generated token under the unmodified logits.

    Attributes:
        logprob: log probability of the generated token.
        top: (token id, log probability) of the most likely tokens, the most likely first; ties by ascending id.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class ImageInput:
    """An image of a prompt, as pixels or features.

    Attributes:
        digest: digest of the pixels or the features; images with the same digest have the same features.
        pixels: float32 [3, image_size, image_size] from `preprocess`, or uint8 [image_size, image_size, 3] from
            `resize`, contiguous; None for an image given as features, and after the image has been encoded.
        features: float32 [n_queries, hidden_size]; None until the image is encoded.
        slots: [start, end) of its tokens in the prompt.
    """

    digest: bytes
    pixels: Optional[NDArray[Any]] = None
    features: Optional[NDArray[np.float32]] = None
    slots: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, pixels: NDArray[Any]) -> ImageInput:
        """Create an image from pixels, to be encoded."""
        return cls(digest_of(pixels), pixels)

    @classmethod
    def encoded(cls, features: NDArray[np.float32]) -> ImageInput:
        """Create an image from its features."""
        return cls(hashlib.sha256(b"features" + digest_of(features)).digest(), None, features)


class Generation:
    """A request in the loop, from submission to finish reason.

    Attributes:
        prompt: token ids of the prompt.
        tokens: generated token ids, the stop token included.
        n_total: number of prompt and generated tokens.
        n_logprobs: number of most likely tokens to report per generated token; None: no log probabilities.
        adapter: name of the adapter; None: the model's weights without an adapter.
        logprobs: log probabilities of `tokens`, if `n_logprobs` is not None.
        n_computed: number of tokens, of prompt + tokens, whose keys and values are in `blocks`.
        n_cached: prompt tokens found in the prefix cache at the first admission; None before.
        finish_reason: "stop", "length" or "cancelled"; None while the request waits or runs, and after an error.
        error: the exception that ended the request, raised to the reader of its tokens.
        encode_seconds: time to encode the images of the request, or to take their features from a cache.
        prefill_seconds, decode_seconds: time of the steps with this request, until its first token and after it.
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
        adapter: Optional[str] = None,
    ) -> None:
        """Create a request.

        Args:
            prompt: token ids.
            images: in the order of their slots, which do not overlap.
            stop_token_ids: tokens that end the completion.
            options: sampling parameters and limits.
            generated: [start, end) ranges of the prompt that decode steps of earlier requests computed.
            rotary_class: determines the rotary base of the prompt (ModelConfig.ntk_doublings).
            n_logprobs, adapter: see the attributes.
        """
        self.prompt = list(prompt)
        self.images = list(images)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.options = options
        self.tokens: list[int] = []
        self.n_logprobs = n_logprobs
        self.adapter = adapter
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: Optional[str] = None
        self.error: Optional[BaseException] = None
        self.encode_seconds = self.prefill_seconds = self.decode_seconds = 0.0

        self.n_total = len(self.prompt)
        self.n_computed = 0
        self.n_cached: Optional[int] = None
        self.blocks: list[int] = []
        self._boundaries = sorted({position for span in generated for position in span})
        self._generated = sorted(generated)
        self._prompt_values = self._hashed_values()
        self._block_keys: list[bytes] = []
        suffix = b"" if adapter is None else b" adapter " + adapter.encode()
        self._chain = hashlib.sha256(b"qwenvl %d%s" % (rotary_class, suffix)).digest()

    @property
    def n_pending(self) -> int:
        """Number of tokens whose keys and values are not yet computed; at least 1 while the request runs."""
        return self.n_total - self.n_computed

    @property
    def decoding(self) -> bool:
        """Whether the next step is a decode step: it computes only the newest token."""
        return self.n_total - self.n_computed == 1 and bool(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether the request has a finish reason or an error."""
        return self.finish_reason is not None or self.error is not None

    def take(self, token: int, logprobs: Optional[TokenLogprobs] = None) -> None:
        """Append a generated token, and set the finish reason on a stop token or at max_new_tokens."""
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.tokens.append(token)
        self.n_total += 1
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.options.max_new_tokens:
            self.finish_reason = "length"

    def ids(self, start: int, end: int) -> list[int]:
        """Token ids [start, end) of prompt + tokens."""
        n_prompt = len(self.prompt)
        if end <= n_prompt:
            return self.prompt[start:end]
        if start >= n_prompt:
            return self.tokens[start - n_prompt : end - n_prompt]
        return [*self.prompt[start:], *self.tokens[: end - n_prompt]]

    def entries(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Split the tokens [start, end) into ranges (start, end, generated): whether the model generated the tokens.

        A range with `generated` is computed with the arithmetic of a decode step, the others with that of a prefill.
        """
        n_prompt = len(self.prompt)
        edges = [start, *(position for position in self._boundaries if start < position < end)]
        if start < n_prompt < end:
            edges.append(n_prompt)
        edges.append(end)
        return [
            (first, last, first >= n_prompt or self._in_generated(first))
            for first, last in zip(edges, edges[1:])
        ]

    def block_keys(self, n_blocks: int, block_tokens: int) -> list[bytes]:
        """Prefix cache keys of the first n_blocks full blocks, a hash chain over what determines their content."""
        while len(self._block_keys) < n_blocks:
            start = len(self._block_keys) * block_tokens
            end = start + block_tokens
            n_prompt = len(self.prompt)
            content = self._prompt_values[start:end].tobytes()
            if end > n_prompt:
                generated = self.tokens[max(0, start - n_prompt) : end - n_prompt]
                content += np.array([token + _GENERATED for token in generated], np.int64).tobytes()
            digests = [
                image.digest for image in self.images if image.slots[0] < end and start < image.slots[1]
            ]
            self._chain = hashlib.sha256(b"".join([self._chain, content, *digests])).digest()
            self._block_keys.append(self._chain)
        return self._block_keys[:n_blocks]

    def reset(self) -> None:
        """Discard the computed state, after the blocks have been released."""
        self.n_computed = 0
        self.blocks = []

    def _in_generated(self, position: int) -> bool:
        return any(start <= position < end for start, end in self._generated)

    def _hashed_values(self) -> NDArray[np.int64]:
        """The value of each prompt token in the block keys.

        Its id, plus _GENERATED if a decode step computed it; -1 - i for the i-th slot of an image.
        """
        values = np.array(self.prompt, np.int64)
        for start, end in self._generated:
            values[start:end] += _GENERATED
        for image in self.images:
            start, end = image.slots
            values[start:end] = -1 - np.arange(end - start)
        return values
