"""Scores of answers about the demo's synthetic images."""

from __future__ import annotations

from paddlemix_qwenvl_plugin.demo.score import GOALS, mark, score
from paddlemix_qwenvl_plugin.demo.world.sample import Sample, Turn
from paddlemix_qwenvl_plugin.evaluation.rates import Rate, table


def sample(task: str, answer: str, question: str = "?", text: str = "") -> Sample:
    return Sample((), (Turn(task, "en", question, answer, text),), "chat")


def test_boxes_count_by_overlap_and_ref() -> None:
    expected = "<ref>A</ref><box>(0,0),(100,100)</box> and <ref>b</ref><box>(500,500),(600,600)</box>."
    caption = sample("grounded caption", expected)
    near = expected.replace("(100,100)", "(110,100)")
    assert (mark(caption, near).words_right, mark(caption, near).boxes_right) == (True, 2)
    other_ref = expected.replace("<ref>b<", "<ref>c<")
    assert (mark(caption, other_ref).words_right, mark(caption, other_ref).boxes_right) == (False, 1)
    assert mark(caption, "no idea").boxes_right == 0
    assert mark(caption, "no idea").boxes == 2


def test_a_question_that_ends_in_a_box_tag() -> None:
    """The answer then begins with the coordinates."""
    box = sample("box", "(0,0),(100,100)</box>", "<ref>the star</ref><box>")
    assert mark(box, "(0,0),(100,90)</box>").boxes_right == 1
    assert mark(box, "(0,0),(100,40)</box>").boxes_right == 0


def test_a_quad_counts_as_its_bounds() -> None:
    star = sample("box", "<ref>x</ref><box>(0,0),(100,100)</box>")
    assert mark(star, "<ref>x</ref><quad>(0,0),(100,0),(100,100),(0,100)</quad>").boxes_right == 1
    assert mark(star, "<ref>x</ref><quad>(0,0),(40,0),(40,100),(0,100)</quad>").boxes_right == 0


def test_rates_by_task() -> None:
    samples = [
        sample("reading", "It says CAT.", text="CAT"),
        sample("reading", "There is no text."),
        sample("count", "There are two stars."),
        sample("box", "<ref>x</ref><box>(0,0),(10,10)</box>"),
    ]
    answers = [
        "It says CAR.",
        "There is no text.",
        "There are two stars.",
        "<ref>x</ref><box>(0,0),(10,10)</box>",
    ]
    rates = score([mark(question, answer) for question, answer in zip(samples, answers)])
    assert rates["words"] == Rate(2, 3)
    assert rates["boxes"] == Rate(1, 1)
    assert rates["reading"] == Rate(0, 1)  # only the image with text
    assert rates["task: reading"] == Rate(1, 2)
    assert rates["task: count"] == Rate(1, 1)
    assert "task: box" not in rates
    assert rates["task: box (boxes)"] == Rate(1, 1)
    lines = table(rates, GOALS).splitlines()
    assert "66.67 %" in lines[0]
    assert lines[0].endswith("2 of 3  (goal 95 %: missed)")
    assert lines[1].endswith("1 of 1  (goal 90 %: reached)")
    assert lines[3].startswith("task: box (boxes)")
    assert lines[3].endswith("1 of 1")  # tasks have no goals


def test_no_rates_without_samples() -> None:
    assert "goal" not in table(score([]), GOALS)


def test_one_wrong_letter_is_a_wrong_word() -> None:
    reading = sample("reading", 'It says "CAT".', text="CAT")
    assert mark(reading, 'It says "CAT".').words_right
    assert not mark(reading, 'It says "CAR".').words_right
    assert not mark(reading, "CAT").words_right
