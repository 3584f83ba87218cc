"""Executor on the portable step program in Paddle Inference (artifact/contract.py), one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.runtime.executor import NO_TOKEN, Picked
from paddlemix_qwenvl_plugin.runtime.generation import Generation
from paddlemix_qwenvl_plugin.runtime.programs import Program, Stage
from paddlemix_qwenvl_plugin.runtime.sampling import RowSampler, log_probabilities
from paddlemix_qwenvl_plugin.runtime.scheduler import Chunk, Limits


class PortableExecutor:
    """Executor on the portable graph. The program takes a KV cache as input and returns logits and a longer cache."""

    def __init__(self, vision: Stage, language: Stage) -> None:
        self._vision_stage = vision
        self._config = language.manifest.config
        self._dtype = language.compute_dtype
        self._program = language.open(".step")
        context = self._config.max_position_embeddings
        # One running request, and one block for the full context: no shared prefixes, no chunked prefill.
        self.limits = Limits(1, context, 1, context, prefix_cache=False)
        self._running: dict[Generation, tuple[RowSampler, list[Any]]] = {}

    @cached_property
    def _vision(self) -> Program:
        return self._vision_stage.open()

    def load(self, vision: bool) -> None:
        """Load the vision stage if `vision`; the language stage is loaded already."""
        if vision:
            _ = self._vision

    def encode_image(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode an image: float32 [3, image_size, image_size] -> float32 [n_queries, hidden_size]."""
        features: NDArray[np.float32] = self._vision([pixels[None]])[0].numpy()[0]
        return features

    def start(self, chunks: Sequence[Chunk]) -> Callable[[], Picked]:
        """Run a step (see Executor) synchronously."""
        [chunk] = chunks
        generation = chunk.generation
        if generation not in self._running:
            sampler = RowSampler(
                generation.options,
                sorted(generation.stop_token_ids),
                self._config.vocab_size,
                generation.tokens,
            )
            self._running[generation] = sampler, self._empty_cache()
        sampler, cache = self._running[generation]
        past = generation.n_computed
        ids = np.array([generation.ids(past, past + chunk.n)], np.int64)
        features, positions = self._images(generation, past)
        valid = np.arange(past + 1)[None] > 0  # the first entry of the cache is never valid, see _empty_cache
        # seq_len, past_len and prompt_len of the contract.
        lengths = (np.array([[length]], np.int64) for length in (chunk.n, past, len(generation.prompt)))
        logits, *cache = self._program([ids, features, positions, *lengths, valid, *cache])
        self._running[generation] = sampler, cache
        row = logits.numpy()[0]
        if not np.isfinite(row).all():
            return lambda: Picked([NO_TOKEN])
        token, n_top = sampler.pick(row), generation.n_logprobs
        picked = Picked([token], None if n_top is None else [log_probabilities(row, token, n_top)])
        return lambda: picked

    def check_device(self) -> None:
        """Raise Paddle's error if the GPU is unusable after a fault."""
        self._program.zeros([1], "float32").numpy()

    def forget(self, generation: Generation) -> None:
        """Free the state of a request, its KV cache included."""
        self._running.pop(generation, None)

    def _empty_cache(self) -> list[Any]:
        """An empty cache: one invalid entry, since Paddle Inference does not accept empty tensors."""
        shape = [1, self._config.num_attention_heads, 1, self._config.head_dim]
        return [self._program.zeros(shape, self._dtype) for _ in range(2 * self._config.num_hidden_layers)]

    def _images(self, generation: Generation, past: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and positions of the images in the tokens from `past` on.

        Without images, zeros at a position with row -1, which the program takes for an absent image.
        """
        images = [image for image in generation.images if image.slots[0] >= past]
        if not images:
            shape = [1, self._config.visual.n_queries, self._config.hidden_size]
            return np.zeros(shape, np.float32), np.array([[-1, 0, 0]], np.int64)
        features = np.stack([image.features for image in images])  # type: ignore[misc]  # encoded already
        # The contract counts from `<img>` to `</img>`, the tags around the slots.
        positions = [(0, image.slots[0] - 1 - past, image.slots[1] - past) for image in images]
        return features, np.array(positions, np.int64)
