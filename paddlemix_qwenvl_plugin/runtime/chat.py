"""A conversation about images."""

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
    """A conversation in the ChatML form. `QwenVL.chat` begins one.

    On the engine, what earlier turns computed is found in the prefix cache: only what follows them is run.

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
        self._images: list[ImageInput] = []
        self._image_size: Optional[tuple[int, int]] = None

    def ask(self, query: Query, **options: Any) -> AnswerStream:
        """Answer the next turn, in pieces; one turn at a time.

        A stream that is closed early counts as a turn with what was said until then, if anything was.

        Args:
            query: text, or a list of parts (processing/prompts.py).
            options: see GenerationOptions.

        Raises:
            UsageError, QwenVLError: one line that names the part, image or option.
        """
        start = time.perf_counter()
        chosen = GenerationOptions.of(options)
        if isinstance(query, str):
            query = [{"text": query}]
        tokenizer = self._vl.tokenizer
        prompt = chat_prompt(tokenizer, query, self.history, self.system)
        opened = self._vl.load_images(render(query)[1])
        images = [*self._images, *self._vl.image_inputs(opened)]
        # The images of dropped turns are dropped too, the oldest first.
        images = images[len(images) - len(prompt.images) :]
        image_size = opened[-1].size if opened else self._image_size

        def remember(answer: Answer) -> None:
            # Stripped, as the official code does it.
            self._history.append((query, answer.text.strip()))
            self._images = images
            self._image_size = image_size

        return self._vl.start(
            prompt,
            images,
            tokenizer.chat_stop_token_ids,
            chosen,
            image_size,
            time.perf_counter() - start,
            remember,
        )
