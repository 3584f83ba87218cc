"""A conversation about pictures that keeps what earlier turns computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from numpy.typing import NDArray

from paddlemix_qwenvl_plugin.processing.prompts import Query, chat_prompt, image_spans
from paddlemix_qwenvl_plugin.runtime.answer import Answer, AnswerStream
from paddlemix_qwenvl_plugin.runtime.kv_cache import KVCache
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL


class Chat:
    """A conversation in the ChatML form. `QwenVL.chat` begins one.

    The KV cache of the turns so far is kept, and only what follows the longest common beginning is run: an earlier
    picture is neither encoded nor prefilled again.

    Attributes:
        system: the system message.
    """

    def __init__(self, vl: QwenVL, system: str) -> None:
        self._vl = vl
        self.system = system
        self.clear()

    @property
    def history(self) -> tuple[tuple[Query, str], ...]:
        """(query, answer) of each turn, the oldest first."""
        return tuple(self._history)

    def clear(self) -> None:
        """Forget all turns."""
        self._history: list[tuple[Query, str]] = []
        self._pixels: list[NDArray[np.float32]] = []
        self._image_size: Optional[tuple[int, int]] = None
        self._ids: list[int] = []
        self._n_prompt = 0
        self._cache: KVCache | None = None

    def ask(self, query: Query, **options: Any) -> AnswerStream:
        """Answer the next turn, in pieces; one turn at a time.

        A stream that is closed early counts as a turn with what was said until then, if anything was.

        Args:
            query: text, or a list of parts (processing/prompts.py).
            options: see GenerationOptions.

        Raises:
            UsageError, QwenVLError: one line that names the part, picture or option.
        """
        start = time.perf_counter()
        chosen = GenerationOptions.of(options)
        if isinstance(query, str):
            query = [{"text": query}]
        tokenizer = self._vl.tokenizer
        prompt = chat_prompt(tokenizer, query, self.history, self.system)
        images = self._vl.load_images(chat_prompt(tokenizer, query).images)
        # Of dropped turns the pictures are dropped too, the oldest first.
        pixels = [*self._pixels, *self._vl.preprocess(images)]
        pixels = pixels[len(pixels) - len(prompt.images) :]
        image_size = images[-1].size if images else self._image_size
        ids = prompt.input_ids
        n_kept = self._n_reusable(ids)
        vision = self._vl.config.visual
        spans = image_spans(ids, vision.image_start_id, vision.n_queries)
        n_kept_pictures = sum(end < n_kept for _, end in spans)
        cache = None
        if self._cache is not None and n_kept:
            # What is kept of a turn that fails or is thrown away: its tokens take the place of those dropped here.
            self._ids = self._ids[:n_kept]
            self._cache = cache = self._cache.first(n_kept)

        def remember(answer: Answer, cache: KVCache) -> None:
            self._history.append((query, answer.text))
            self._pixels = pixels
            self._image_size = image_size
            self._ids = [*ids, *answer.token_ids[:-1]]
            self._n_prompt = len(ids)
            self._cache = cache

        return self._vl.start(
            ids[n_kept:],
            pixels[n_kept_pictures:],
            [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id],
            chosen,
            image_size,
            time.perf_counter() - start,
            cache,
            remember,
        )

    def _n_reusable(self, ids: Sequence[int]) -> int:
        """How many tokens at the beginning of a prompt the cache has."""
        config = self._vl.config
        # The rotary base follows the length of the prompt, and the cached keys were turned by theirs.
        if config.ntk_doublings(len(ids)) != config.ntk_doublings(self._n_prompt):
            return 0
        n = 0
        while n < min(len(ids) - 1, len(self._ids)) and ids[n] == self._ids[n]:
            n += 1
        return n  # never inside a picture: before each stands its number in the conversation
