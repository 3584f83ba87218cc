"""Samples of the demo world: scenes, turns about them, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paddlemix_qwenvl_plugin.demo.world.scene import Scene


@dataclass(frozen=True)
class Turn:
    """A question about the images and its only correct answer.

    Attributes:
        task: the family under which results are reported.
        language: "en" or "zh".
        question: text after the images in the prompt.
        answer: expected completion, tags included, without the stop token.
        text: the texts in the image, joined by spaces, for reading tasks; empty without texts, and for other tasks.
    """

    task: str
    language: str
    question: str
    answer: str
    text: str = ""


@dataclass(frozen=True)
class Sample:
    """Turns about the same images. `form`: "chat" for Qwen-VL-Chat prompts, "base" for the base model (one turn)."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    form: Literal["chat", "base"]

    def parts(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """Prompt parts of the first turn for `processing.prompts`; `images`: drawn images or their paths."""
        return [*({"image": image} for image in images), {"text": self.turns[0].question}]
