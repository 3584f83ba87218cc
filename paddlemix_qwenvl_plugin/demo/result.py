"""Results of a demo run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paddlemix_qwenvl_plugin.demo.questions import Question
from paddlemix_qwenvl_plugin.demo.score import mark
from paddlemix_qwenvl_plugin.runtime.answer import Answer

# Timings of an answer that add up to its duration without the loading of the stages.
_TIMINGS = ("prepare", "encode_images", "prefill", "decode")


@dataclass(frozen=True)
class Result:
    """A bundled question and the model's answer."""

    question: Question
    answer: Answer

    @cached_property
    def right(self) -> bool:
        """Whether the text is exact, and every box has its ref and overlaps its object (IoU at least 0.5).

        False if a box is missing or additional, or the answer has `problems`.
        """
        marked = mark(self.question.sample, self.answer.text)
        return (
            marked.words_right
            and marked.boxes_right == marked.boxes == len(self.answer.boxes)
            and not self.answer.problems
        )

    @property
    def seconds(self) -> float:
        """Time from the question to the complete answer, in seconds, excluding the loading of the stages."""
        return sum(self.answer.timings[name] for name in _TIMINGS)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        turn = self.question.turn
        return {
            "images": [path.name for path in self.question.images],
            "question": turn.question,
            "expected": turn.answer,
            "right": self.right,
            "answer": self.answer.as_dict(),
        }


@dataclass(frozen=True)
class Run:
    """Results of all questions, the model's parameter count, and the export time in seconds."""

    results: tuple[Result, ...]
    parameters: int
    export_seconds: float

    @property
    def right(self) -> int:
        """Number of correct answers."""
        return sum(result.right for result in self.results)

    @property
    def answer_seconds(self) -> float:
        """Time of all answers, in seconds."""
        return sum(result.seconds for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Contents of answers.json."""
        return {
            "questions": len(self.results),
            "right": self.right,
            "answers": {result.question.name: result.as_dict() for result in self.results},
        }
