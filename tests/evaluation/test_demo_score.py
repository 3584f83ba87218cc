"""Scores of answers about the demo world."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paddlemix_qwenvl_plugin.demo_world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.evaluation.demo import Rate, iou, mark, score, table
from paddlemix_qwenvl_plugin.processing.boxes import Box


def sample(task: str, answer: str, question: str = "?", text: str = "") -> Sample:
    return Sample((), (Turn(task, "en", question, answer, text),), "chat")


@pytest.mark.parametrize(("hits", "n"), [(10, 10), (0, 7), (81, 100), (1, 3)])
def test_wilson_interval_is_where_the_normal_test_rejects(hits: int, n: int) -> None:
    """The interval's ends p are those with |hits / n - p| = 1.96 sqrt(p (1 - p) / n): found here by bisection."""

    def far(p: float) -> bool:
        return abs(hits / n - p) > 1.96 * math.sqrt(p * (1 - p) / n)

    ends = []
    for outer in (0.0, 1.0):
        inside = hits / n
        if not far(outer) or outer == inside:
            ends.append(outer)
            continue
        outside = outer
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if far(middle) else (middle, outside)
        ends.append(inside)
    assert Rate(hits, n).interval() == pytest.approx(tuple(ends), abs=1e-6)


def test_nothing_tried_says_nothing() -> None:
    assert Rate(0, 0).interval() == (0.0, 1.0)
    assert math.isnan(Rate(0, 0).value)


def test_iou_counts_pixels() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        planes, boxes = [], []
        for _ in range(2):
            x1, x2 = np.sort(random.integers(0, 21, 2))
            y1, y2 = np.sort(random.integers(0, 21, 2))
            plane = np.zeros((20, 20), bool)
            plane[y1:y2, x1:x2] = True
            planes.append(plane)
            boxes.append(Box("box", ((int(x1), int(y1)), (int(x2), int(y2)))))
        union = (planes[0] | planes[1]).sum()
        expected = (planes[0] & planes[1]).sum() / union if union else 0.0
        assert iou(*boxes) == pytest.approx(expected)


def test_boxes_count_by_overlap_and_by_what_they_are_of() -> None:
    wanted = "<ref>A</ref><box>(0,0),(100,100)</box> and <ref>b</ref><box>(500,500),(600,600)</box>."
    asked = sample("grounded caption", wanted)
    near = wanted.replace("(100,100)", "(110,100)")
    assert (mark(asked, near).words_right, mark(asked, near).boxes_right) == (True, 2)
    swapped = wanted.replace("<ref>b<", "<ref>c<")
    assert (mark(asked, swapped).words_right, mark(asked, swapped).boxes_right) == (False, 1)
    assert mark(asked, "no idea").boxes_right == 0
    assert mark(asked, "no idea").boxes == 2


def test_a_question_may_open_the_box() -> None:
    asked = sample("box", "(0,0),(100,100)</box>", "<ref>the star</ref><box>")
    assert mark(asked, "(0,0),(100,90)</box>").boxes_right == 1
    assert mark(asked, "(0,0),(100,40)</box>").boxes_right == 0


def test_rates_by_task() -> None:
    asked = [
        sample("reading", "It says CAT.", text="CAT"),
        sample("reading", "There is no text."),
        sample("count", "There are two stars."),
        sample("box", "<ref>x</ref><box>(0,0),(10,10)</box>"),
    ]
    given = [
        "It says CAR.",
        "There is no text.",
        "There are two stars.",
        "<ref>x</ref><box>(0,0),(10,10)</box>",
    ]
    rates = score([mark(one, answer) for one, answer in zip(asked, given)])
    assert rates["words"] == Rate(2, 3)
    assert rates["boxes"] == Rate(1, 1)
    assert rates["reading"] == Rate(0, 1)
    assert rates["task: reading"] == Rate(1, 2)
    assert rates["task: count"] == Rate(1, 1)
    assert "task: box" not in rates
    assert "66.67 %" in table(rates)
