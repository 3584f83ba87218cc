"""Boxes in answers: parsing, corrections, and error messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.prompts import render

coordinate = st.integers(0, 1000)
corner_box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda corners: [
        *(min(corners[0], corners[2]), min(corners[1], corners[3])),
        *(max(corners[0], corners[2]), max(corners[1], corners[3])),
    ]
)
ref_text = st.text(min_size=1).map(lambda text: text.replace("<", "").strip()).filter(bool)
box_part = st.fixed_dictionaries(
    {"box": st.lists(corner_box, min_size=1, max_size=3)}, optional={"ref": ref_text}
)
fragments = [
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "(1,2)",
    ",",
    "(3,4)",
    "(",
    ")",
    "-5",
    "99999999",
]


@given(st.lists(box_part, min_size=1, max_size=4))
def test_parsing_a_rendered_prompt_returns_its_boxes(parts: list[dict]) -> None:  # type: ignore[type-arg]
    # With text between the parts, so that a box without a ref does not take the ref of the box before it.
    text, _ = render([item for part in parts for item in (part, {"text": " and "})])
    parse = parse_boxes(text)
    expected = [
        Box("box", ((x1, y1), (x2, y2)), part.get("ref")) for part in parts for x1, y1, x2, y2 in part["box"]
    ]
    assert parse.boxes == expected
    assert parse.problems == []
    assert parse.text == "".join(part.get("ref", "") + " and " for part in parts)


@given(st.text() | st.lists(st.sampled_from(fragments) | st.text(max_size=3), max_size=20).map("".join))
def test_any_text_is_accepted(text: str) -> None:
    parse = parse_boxes(text)
    for box in parse.boxes:
        assert all(0 <= value <= 1000 for point in box.points for value in point)
        assert len(box.points) == (2 if box.kind == "box" else 4)
    if "<box>" in text and not parse.boxes:
        assert parse.problems
    if not any(tag in text for tag in fragments if tag.startswith("<")):
        assert parse.text == text


def test_answer_with_several_boxes() -> None:
    parse = parse_boxes(
        "Here: <ref> two dogs</ref><box>(1,2),(3,4)</box> <box>( 5, 6 ),(7,8)</box>, <box>(0,0),(9,9)</box>."
    )
    assert parse.boxes == [
        Box("box", ((1, 2), (3, 4)), "two dogs"),
        Box("box", ((5, 6), (7, 8)), "two dogs"),
        Box("box", ((0, 0), (9, 9)), None),
    ]
    assert parse.problems == []
    assert parse.text == "Here:  two dogs , ."


def test_quad_keeps_its_order() -> None:
    parse = parse_boxes("<ref>sign</ref><quad>(9,1),(1,2),(3,3),(4,4)</quad>")
    assert parse.boxes == [Box("quad", ((9, 1), (1, 2), (3, 3), (4, 4)), "sign")]
    assert parse.problems == []


@pytest.mark.parametrize(
    ("text", "points", "problem"),
    [
        ("<box>(3,4),(1,2)</box>", ((1, 2), (3, 4)), "put in order"),
        ("<box>(3,2),(1,4)</box>", ((1, 2), (3, 4)), "put in order"),
        ("<box>(3,4),(1001,2000)</box>", ((3, 4), (1000, 1000)), "moved to the edge"),
        ("<box>(-3,4),(10,20)</box>", ((0, 4), (10, 20)), "moved to the edge"),
    ],
)
def test_corrected_boxes_are_reported(text: str, points: tuple, problem: str) -> None:  # type: ignore[type-arg]
    parse = parse_boxes(text)
    assert [box.points for box in parse.boxes] == [points]
    assert len(parse.problems) == 1
    assert problem in parse.problems[0]
    assert "at character 0" in parse.problems[0]


@pytest.mark.parametrize(
    ("text", "text_without_tags", "problem"),
    [
        ("a<box>(1,2),(3", "a", "<box> at character 1 is not closed"),
        ("a<box>(1,2),(3,4) b", "ab", "<box> at character 1 is not closed"),
        ("a<box>b</box>c", "ac", "<box> at character 1 is malformed: 'b'"),
        ("a<box>(1,2)</box>c", "ac", "malformed"),
        ("a<box>(1,2),(3,4),(5,6)</box>c", "ac", "malformed"),
        ("a<quad>(1,2),(3,4)</quad>c", "ac", "malformed"),
        ("a<box>(1.5,2),(3,4)</box>c", "ac", "malformed"),
        ("a<box>(1,2),(3," + "9" * 5000 + ")</box>c", "ac", "malformed"),  # int() refuses so many digits
        ("a</box>c", "ac", "</box> at character 1 has no <box>"),
        ("a<ref>b", "ab", "<ref> at character 1 is not closed"),
        ("a<ref></ref>b", "ab", "<ref> at character 1 is empty"),
    ],
)
def test_malformed_boxes_are_reported(text: str, text_without_tags: str, problem: str) -> None:
    parse = parse_boxes(text)
    assert parse.boxes == []
    assert parse.text == text_without_tags
    assert len(parse.problems) == 1
    assert problem in parse.problems[0]
    assert len(parse.problems[0]) < 120


def test_the_box_after_a_malformed_one_is_parsed() -> None:
    parse = parse_boxes("<ref>a</ref><box>(1,2),<ref>b</ref><box>(1,2),(3,4)</box>")
    assert parse.boxes == [Box("box", ((1, 2), (3, 4)), "b")]
    assert len(parse.problems) == 1


def test_conversion_to_pixels() -> None:
    box = Box("box", ((0, 500), (250, 1000)))
    assert box.to_pixels(640, 480) == ((0.0, 240.0), (160.0, 480.0))
