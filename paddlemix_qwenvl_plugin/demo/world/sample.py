"""A task of the demo world: pictures, what is said about them in turns, and the prompts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paddlemix_qwenvl_plugin.demo.world.scene import Scene


@dataclass(frozen=True)
class Turn:
    """A question that the pictures answer, and the one right answer.

    Attributes:
        task: its family, by which results are reported.
        language: "en" or "zh".
        question: what follows the pictures in a prompt.
        answer: the model's words, tags included, without the end token.
        text: the words to read, for reading tasks.
    """

    task: str
    language: str
    question: str
    answer: str
    text: str = ""


@dataclass(frozen=True)
class Sample:
    """Turns about the same pictures. `form` is Qwen-VL-Chat's ("chat") or the base model's ("base", one turn)."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]
    form: Literal["chat", "base"]

    def parts(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """The first turn as `processing.prompts` takes it, for the drawn `images` or their paths."""
        return [*({"image": image} for image in images), {"text": self.turns[0].question}]
