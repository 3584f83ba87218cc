"""Referring-expression accuracy (RefCOCO, RefCOCO+, RefCOCOg): overlap with the reference box."""

from __future__ import annotations

from typing import Optional

from pydantic import AliasChoices, Field, FiniteFloat, PositiveInt, model_validator

from paddlemix_qwenvl_plugin.evaluation.ask import Question
from paddlemix_qwenvl_plugin.evaluation.overlap import bounds, iou
from paddlemix_qwenvl_plugin.evaluation.rows import Id, Row
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=28, min_new_tokens=10)
"""Generation options of the official evaluation: room for one box."""

# The official evaluation divides coordinates by 999, although the model's boxes are in thousandths.
_SCALE = 999

_ROUNDING = 1.0  # pixels by which a box of a data set may exceed its image


class GroundingRow(Row):
    """Row of a referring-expression data set.

    Attributes:
        id: id of the row; None: its line number.
        sentence: the expression; `sent` in the official files.
        bbox: left, top, right and bottom in pixels.
        width, height: size of the image in pixels.
    """

    id: Optional[Id] = None
    sentence: str = Field(validation_alias=AliasChoices("sentence", "sent"))
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    width: PositiveInt
    height: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> GroundingRow:
        left, top, right, bottom = self.bbox
        if not (
            -_ROUNDING <= left < right <= self.width + _ROUNDING
            and -_ROUNDING <= top < bottom <= self.height + _ROUNDING
        ):
            raise ValueError(
                "bbox must be [left, top, right, bottom] in pixels of the image, "
                f"which is {self.width} x {self.height}, got {list(self.bbox)}"
            )
        return self

    def key(self, number: int) -> Id:
        """The id, or the line number without one."""
        return number if self.id is None else self.id

    def prompt(self) -> Question:
        """Prompt of the row: the expression in `<ref>`, then an open `<box>` that the completion continues."""
        return Question(self.image, self.sentence, "<ref>", "</ref><box>")


def overlap(row: GroundingRow, answer: str) -> float:
    """Intersection over union of the reference with the bounds of the answer's first box or quad; 0 without one."""
    # The prompt ends with the tag of the answer's first box. If the answer repeats the tag, the extra tag is harmless.
    boxes = parse_boxes(f"<box>{answer}").boxes
    if not boxes:
        return 0.0
    x_scale, y_scale = row.width / _SCALE, row.height / _SCALE
    return iou(bounds((x * x_scale, y * y_scale) for x, y in boxes[0].points), row.bbox)
