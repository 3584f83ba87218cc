"""Conversations about images with the chat model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Optional

from paddlemix_qwenvl_plugin.processing.prompts import Query, chat_prompt, render
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.runtime.generation import ImageInput
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.stream import AnswerStream

if TYPE_CHECKING:
    from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL


class Chat:
    """A conversation about images in the ChatML form; created by `QwenVL.chat`.

    On the engine, the prefix cache keeps the full blocks of earlier turns until other requests need the memory. A turn
    computes only the tokens after these blocks, but more if the prompt has become so long that it lacks the oldest
    turns or has another rotary base (dynamic NTK).

    Attributes:
        system: the system message.
    """

    def __init__(self, vl: QwenVL, system: str, adapter: Optional[str] = None) -> None:
        self._vl = vl
        self._adapter = adapter
        self.system = system
        self.clear()

    @property
    def history(self) -> tuple[tuple[Query, str], ...]:
        """The (query, answer) turns so far, the oldest first."""
        return tuple(self._history)

    def clear(self) -> None:
        """Remove all turns from the history."""
        self._history: list[tuple[Query, str]] = []
        self._images: list[ImageInput] = []
        self._image_size: Optional[tuple[int, int]] = None

    def ask(self, query: Query, **options: Any) -> AnswerStream:
        """Ask the next question and return a stream of the answer's segments.

        The turn is added to the history when the stream ends; ask the next question after that. A stream that is closed
        or stopped after its first token adds a turn with the text so far; one that ends before, or fails, adds none.

        Args:
            query: text, in which `<img>` is an error, or a list of parts (processing/prompts.py).
            options: see GenerationOptions.

        Raises:
            UsageError, QwenVLError: an invalid part, image or option, or an unknown adapter, which the message names;
                or a prompt that fills the context.
        """
        start = time.perf_counter()
        generation_options = GenerationOptions.of(options)
        if isinstance(query, str):
            query = [{"text": query}]
        tokenizer = self._vl.tokenizer
        prompt = chat_prompt(tokenizer, query, self.history, self.system)
        _, sources = render(query)
        loaded = self._vl.load_images(sources)
        images = [*self._images, *self._vl.image_inputs(loaded)]
        # A long prompt lacks the oldest turns (chat_prompt), and therefore the oldest images.
        images = images[len(images) - len(prompt.images) :]
        image_size = loaded[-1].size if loaded else self._image_size

        def append_turn(answer: Answer) -> None:
            # The official code strips whitespace from the answers in the history.
            self._history.append((query, answer.text.strip()))
            self._images = images
            self._image_size = image_size

        return self._vl.start(
            prompt,
            images,
            tokenizer.chat_stop_token_ids,
            generation_options,
            image_size,
            time.perf_counter() - start,
            append_turn,
            self._adapter,
        )
