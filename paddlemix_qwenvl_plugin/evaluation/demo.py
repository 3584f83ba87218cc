"""Score answers about the demo world: exact words, boxes by their overlap, and how sure the rates are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paddlemix_qwenvl_plugin.demo_world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.processing.boxes import Box, BoxParse, parse_boxes

IOU = 0.5

_OPEN_BOX = "<box>"


@dataclass(frozen=True)
class Rate:
    """`hits` of `n`."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval, 95 % by default; (0, 1) without a trial."""
        if not self.n:
            return 0.0, 1.0
        square = z * z / self.n
        centre = self.value + square / 2
        spread = z * math.sqrt((self.value * (1 - self.value) + square / 4) / self.n)
        return max(0.0, (centre - spread) / (1 + square)), min(1.0, (centre + spread) / (1 + square))


@dataclass(frozen=True)
class Mark:
    """How one answer did: its words, and how many of the boxes that it should have are there."""

    task: str
    words_right: bool
    boxes_right: int
    boxes: int
    reading: bool


def mark(sample: Sample, answer: str) -> Mark:
    """Compare an answer to a sample's first turn with the right one.

    Words are compared without boxes, character by character. The boxes are compared in order; a box is right if
    intersection over union is at least IOU and it belongs to the same `<ref>`.
    """
    turn = sample.turns[0]
    wanted, got = _parsed(turn, turn.answer), _parsed(turn, answer)
    right = sum(a.ref == b.ref and iou(a, b) >= IOU for a, b in zip(wanted.boxes, got.boxes))
    return Mark(turn.task, wanted.text == got.text, right, len(wanted.boxes), bool(turn.text))


def score(marks: Sequence[Mark]) -> dict[str, Rate]:
    """Rates: of everything first, then by task.

    "words": captions and answers word for word; "boxes": boxes with an IoU of at least 0.5; "reading": words read
    without a wrong letter; then each task's own, with " (boxes)" for its boxes.
    """
    # An answer that is nothing but a box has no words of its own.
    worded = [one for one in marks if one.task != "box"]
    rates = {
        "words": Rate(sum(one.words_right for one in worded), len(worded)),
        "boxes": _boxes(marks),
        "reading": _words([one for one in marks if one.reading]),
    }
    for task in sorted({one.task for one in marks}):
        of_task = [one for one in marks if one.task == task]
        if task != "box":
            rates[f"task: {task}"] = _words(of_task)
        if any(one.boxes for one in of_task):
            rates[f"task: {task} (boxes)"] = _boxes(of_task)
    return rates


def table(rates: dict[str, Rate]) -> str:
    """The rates as lines: name, percentage, 95 % interval, hits of trials."""
    lines = []
    for name, rate in rates.items():
        low, high = rate.interval()
        lines.append(
            f"{name:32} {100 * rate.value:6.2f} %  [{100 * low:.1f}, {100 * high:.1f}]  {rate.hits} of {rate.n}"
        )
    return "\n".join(lines)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 for empty ones."""
    (left, top), (right, bottom) = a.points[0], a.points[-1]
    (other_left, other_top), (other_right, other_bottom) = b.points[0], b.points[-1]
    width = min(right, other_right) - max(left, other_left)
    height = min(bottom, other_bottom) - max(top, other_top)
    shared = max(0, width) * max(0, height)
    union = (right - left) * (bottom - top) + (other_right - other_left) * (other_bottom - other_top) - shared
    return shared / union if union else 0.0


def _parsed(turn: Turn, answer: str) -> BoxParse:
    # The base model's question may end in the tag that its answer goes on from.
    return parse_boxes(_OPEN_BOX + answer if turn.question.endswith(_OPEN_BOX) else answer)


def _words(marks: Sequence[Mark]) -> Rate:
    return Rate(sum(one.words_right for one in marks), len(marks))


def _boxes(marks: Sequence[Mark]) -> Rate:
    return Rate(sum(one.boxes_right for one in marks), sum(one.boxes for one in marks))
