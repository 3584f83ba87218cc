"""Scores of demo-world answers: exact text, boxes by intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from paddlemix_qwenvl_plugin.demo.world.draw import draw
from paddlemix_qwenvl_plugin.demo.world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.evaluation.overlap import IOU, bounds, iou
from paddlemix_qwenvl_plugin.evaluation.rates import Rate
from paddlemix_qwenvl_plugin.processing.boxes import BoxParse, parse_boxes
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.runtime.predictor import QwenVL
from paddlemix_qwenvl_plugin.runtime.request import Request

GOALS = {"words": 0.95, "boxes": 0.9, "reading": 0.9}
"""Target rates of the shipped model."""

_OPEN_BOX = "<box>"

# Almost twice the longest expected answers: captions of four objects with boxes, about 110 tokens.
_MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class Mark:
    """Score of one answer.

    Attributes:
        task: Turn.task of the sample.
        words_right: whether the text without boxes is correct.
        boxes_right, boxes: number of correct boxes, and of expected boxes.
        reading: whether the question asks for the text in an image that has one.
    """

    task: str
    words_right: bool
    boxes_right: int
    boxes: int
    reading: bool


def answers(model: QwenVL, samples: Iterable[Sample]) -> Iterator[str]:
    """Draw each sample's images and answer its first turn about them, with greedy decoding."""
    streams = (model.ask(request(sample, [draw(scene) for scene in sample.scenes])) for sample in samples)
    return (answer.text for answer in model.finish_all(streams))


def request(sample: Sample, images: Sequence[Image.Image]) -> Request:
    """Build the request for a sample's first turn about these images."""
    options = GenerationOptions(max_new_tokens=_MAX_NEW_TOKENS)
    return Request(sample.parts(images), options, chat=sample.form == "chat")


def mark(sample: Sample, answer: str) -> Mark:
    """Score an answer to a sample's first turn.

    The text without boxes must match exactly. Boxes are compared in order: a box is correct if its intersection over
    union is at least IOU and it has the same `<ref>`. Boxes beyond the number of expected ones are ignored.
    """
    turn = sample.turns[0]
    expected, actual = _parsed(turn, turn.answer), _parsed(turn, answer)
    boxes_right = sum(
        a.ref == b.ref and iou(bounds(a.points), bounds(b.points)) >= IOU
        for a, b in zip(expected.boxes, actual.boxes)
    )
    words_right = expected.text == actual.text
    return Mark(turn.task, words_right, boxes_right, len(expected.boxes), reading=bool(turn.text))


def score(marks: Sequence[Mark]) -> dict[str, Rate]:
    """Compute rates over all answers, then per task.

    "words": answers with exactly the expected text, without the task "box"; "boxes": correct boxes (see `mark`);
    "reading": as "words", for answers with `Mark.reading`. Then for each task NAME "task: NAME", the rate of "words"
    (not for "box"), and "task: NAME (boxes)", that of "boxes" (only if boxes are expected).
    """
    # A box-only answer has no text to score.
    with_text = [scored for scored in marks if scored.task != "box"]
    rates = {
        "words": _words(with_text),
        "boxes": _boxes(marks),
        "reading": _words([scored for scored in marks if scored.reading]),
    }
    for task in sorted({scored.task for scored in marks}):
        of_task = [scored for scored in marks if scored.task == task]
        if task != "box":
            rates[f"task: {task}"] = _words(of_task)
        if any(scored.boxes for scored in of_task):
            rates[f"task: {task} (boxes)"] = _boxes(of_task)
    return rates


def _parsed(turn: Turn, answer: str) -> BoxParse:
    # A base-model prompt may end with an open tag that the completion continues.
    return parse_boxes(_OPEN_BOX + answer if turn.question.endswith(_OPEN_BOX) else answer)


def _words(marks: Sequence[Mark]) -> Rate:
    return Rate(sum(scored.words_right for scored in marks), len(marks))


def _boxes(marks: Sequence[Mark]) -> Rate:
    return Rate(sum(scored.boxes_right for scored in marks), sum(scored.boxes for scored in marks))
