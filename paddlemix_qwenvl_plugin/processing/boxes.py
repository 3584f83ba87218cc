"""Parse boxes in the model's answers: `<ref>the dog</ref><box>(x1,y1),(x2,y2)</box>`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Optional

_FULL = 1000  # coordinate of the right or bottom edge of the image

_TAG = re.compile(r"<(/?)(ref|box|quad)>")
# At most six digits: int() refuses numbers of thousands of digits.
_POINT = r"\(\s*(-?[0-9]{1,6})\s*,\s*(-?[0-9]{1,6})\s*\)"
_POINTS = {
    "box": re.compile(rf"\s*{_POINT}\s*,\s*{_POINT}\s*"),
    "quad": re.compile(rf"\s*{_POINT}\s*,\s*{_POINT}\s*,\s*{_POINT}\s*,\s*{_POINT}\s*"),
}
# Coordinates of a box without its end tag, as at the end of a truncated answer.
_COORDINATES = re.compile(r"[\s0-9(),-]*")

Points = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Box:
    """A box (top left and bottom right corner) or a quad (four corners in the model's order) in an answer.

    `points` are (x, y) in thousandths of the image's width and height, 0 to 1000. `ref` is the text of the `<ref>` that
    the box belongs to, if any.
    """

    kind: Literal["box", "quad"]
    points: Points
    ref: Optional[str] = None

    def to_pixels(self, width: int, height: int) -> tuple[tuple[float, float], ...]:
        """The points as (x, y) in pixels of an image of `width` x `height` pixels."""
        return tuple((x * width / _FULL, y * height / _FULL) for x, y in self.points)


@dataclass(frozen=True)
class BoxParse:
    """Result of `parse_boxes`: boxes in order, problems as one line each, and the text without boxes and tags."""

    boxes: list[Box]
    problems: list[str]
    text: str


def parse_boxes(text: str) -> BoxParse:
    """Parse all boxes in an answer; any text is accepted.

    A box belongs to the preceding `<ref>` if only spaces and other boxes are between them. The returned text includes
    the text of refs, but no boxes. Coordinates outside 0 to 1000 are clamped, and the corners of a box are ordered (top
    left first). Malformed boxes, unpaired tags and empty refs are omitted. `problems` reports each of these changes and
    omissions.
    """
    boxes: list[Box] = []
    problems: list[str] = []
    clean: list[str] = []
    ref: str | None = None
    tags = list(_TAG.finditer(text))
    position = 0
    index = 0
    while index < len(tags):
        tag = tags[index]
        between = text[position : tag.start()]
        clean.append(between)
        if between.strip():
            ref = None
        closing, kind = tag.group(1), tag.group(2)
        position = tag.end()
        index += 1
        where = f"at character {tag.start()}"
        if closing:
            problems.append(f"{tag.group()} {where} has no <{kind}> before it")
            ref = None
            continue
        end = tags[index] if index < len(tags) else None
        if end is None or end.group() != f"</{kind}>":
            problems.append(f"<{kind}> {where} is not closed")
            if kind != "ref":
                coordinates = _COORDINATES.match(text, position)
                assert coordinates  # without coordinates, the empty text
                position = coordinates.end()
            ref = None
            continue
        content = text[position : end.start()]
        position = end.end()
        index += 1
        if kind == "ref":
            clean.append(content)
            ref = content.strip() or None
            if ref is None:
                problems.append(f"<ref> {where} is empty")
            continue
        match = _POINTS[kind].fullmatch(content)
        if match is None:
            problems.append(f"<{kind}> {where} is malformed: {_shorten(content)!r}")
            continue
        values = [int(value) for value in match.groups()]
        points, point_problems = _normalise(kind, list(zip(values[::2], values[1::2])))
        problems += [f"<{kind}> {where}: {problem}, got {_shorten(content)!r}" for problem in point_problems]
        boxes.append(Box("box" if kind == "box" else "quad", points, ref))
    clean.append(text[position:])
    return BoxParse(boxes, problems, "".join(clean))


def _normalise(kind: str, points: list[tuple[int, int]]) -> tuple[Points, list[str]]:
    problems = []
    clamped = [(min(max(x, 0), _FULL), min(max(y, 0), _FULL)) for x, y in points]
    if clamped != points:
        problems.append(f"coordinates outside 0 to {_FULL} were moved to the edge")
    if kind == "box":
        (x1, y1), (x2, y2) = clamped
        ordered = [(min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))]
        if ordered != clamped:
            problems.append("corners were put in order")
        return tuple(ordered), problems
    return tuple(clamped), problems


def _shorten(content: str) -> str:
    return content if len(content) <= 40 else content[:39] + "…"
