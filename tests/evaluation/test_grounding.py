"""Score of grounding answers, and validation of grounding rows."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from paddlemix_qwenvl_plugin.evaluation.grounding import GroundingRow, overlap


def row(**changes: Any) -> GroundingRow:
    values = {"image": "x.png", "sent": "the dog", "bbox": [0, 0, 100, 50], "width": 200, "height": 100}
    return GroundingRow.model_validate({**values, **changes})


@pytest.mark.parametrize(
    # An answer continues the prompt, which ends with <box>; coordinates are in thousandths of width and height.
    ("answer", "expected"),
    [
        ("(0,0),(499.5,499)</box>", 0.0),  # coordinates must be integers
        ("(0,0),(500,500)</box>", 1.0),
        ("(0,0),(500,250)</box>", 0.5),
        ("(0,0),(500,500)</box><ref>a cat</ref><box>(900,900),(999,999)</box>", 1.0),  # two boxes
        ("<ref>the dog</ref><box>(0,0),(500,500)</box>", 1.0),
        ("(500,500),(999,999)</box>", 0.0),
        ("<quad>(0,0),(500,0),(500,500),(0,500)</quad>", 1.0),
        ("<quad>(250,500),(0,250),(250,0),(500,250)</quad>", 1.0),  # the bounds of a diamond
        ("the dog", 0.0),
        ("", 0.0),
    ],
)
def test_score_is_the_overlap_of_the_first_box(answer: str, expected: float) -> None:
    # The score divides by 999: 500 is not exactly the middle.
    assert overlap(row(), answer) == pytest.approx(expected, abs=0.003)


def test_coordinates_are_relative_to_width_and_height() -> None:
    wide = row(bbox=[300, 10, 400, 20], width=999, height=111)
    assert overlap(wide, "(300,90),(400,180)</box>") == pytest.approx(1.0)


def test_coordinate_999_is_the_edge_of_the_image() -> None:
    assert overlap(row(bbox=[0, 0, 200, 100]), "(0,0),(999,999)</box>") == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bbox",
    [
        [150, 80, 100, 50],  # left, top, width, height instead of left, top, right, bottom
        [0, 0, 300, 50],  # beyond the image
        [0, 0, 0, 50],  # empty
        [0, 0, 100],
        [0, 0, float("nan"), 50],
    ],
)
def test_invalid_box_is_rejected(bbox: list[float]) -> None:
    with pytest.raises(ValidationError):
        row(bbox=bbox)


def test_box_may_exceed_the_image_by_a_rounding_error() -> None:
    assert row(bbox=[-0.5, 0, 200.4, 50]).bbox[2] == 200.4


def test_key_is_the_id_or_the_line_number() -> None:
    assert row().key(7) == 7
    assert row(id="a").key(7) == "a"


def test_sentence_has_two_names() -> None:
    assert GroundingRow(image="x", sentence="it", bbox=(0, 0, 1, 1), width=1, height=1).sentence == "it"
    assert row(sent="it").sentence == "it"
