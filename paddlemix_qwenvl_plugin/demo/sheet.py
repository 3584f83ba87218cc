"""Contact sheet of a demo run: one image of all results, with boxes drawn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from paddlemix_qwenvl_plugin.demo.result import Result
from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.drawing import can_draw, draw_boxes, font_for

COLUMNS = 3
# Lengths in pixels.
SIDE = 300
GAP = 16
_FONT_SIZE = 15
_LINE_HEIGHT = 20
_INK, _SOFT, _RIGHT, _WRONG, _PAPER, _EDGE = "#16191f", "#596273", "#12693a", "#a3121f", "#ffffff", "#d5dae1"
_NO_FONT = "(no font for this text here: see the page)"

# (colour, text)
_Lines = list[tuple[str, str]]


def contact_sheet(results: Sequence[Result]) -> Image.Image:
    """Draw the contact sheet, RGB: rows of up to COLUMNS images of SIDE pixels with boxes, and text below them."""
    rows = [[(column, result, _text(result)) for column, result in row] for row in _rows(results)]
    heights = [SIDE + 2 * GAP + _LINE_HEIGHT * max(len(lines) for _, _, lines in row) for row in rows]
    sheet = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), GAP + sum(heights)), _PAPER)
    drawing = ImageDraw.Draw(sheet)
    top = GAP
    for row, height in zip(rows, heights):
        for column, result, lines in row:
            left = GAP + column * (SIDE + GAP)
            for number, image in enumerate(_images(result)):
                x = left + number * (SIDE + GAP)
                sheet.paste(image, (x, top))
                drawing.rectangle((x - 1, top - 1, x + SIDE, top + SIDE), outline=_EDGE)
            # anchor="ls": lines start at the left end of the baseline, which Latin and Chinese text share.
            for number, (colour, line) in enumerate(lines, start=1):
                start = (left, top + SIDE + 2 + number * _LINE_HEIGHT)
                drawing.text(start, line, fill=colour, font=font_for(line, _FONT_SIZE), anchor="ls")
        top += height
    return sheet


def _rows(results: Sequence[Result]) -> Iterator[list[tuple[int, Result]]]:
    """Lay out the results in rows of (first column, result)."""
    row: list[tuple[int, Result]] = []
    column = 0
    for result in results:
        width = len(result.question.images)
        if column + width > COLUMNS:
            yield row
            row, column = [], 0
        row.append((column, result))
        column += width
    yield row


def _images(result: Result) -> Iterator[Image.Image]:
    """The question's images; boxes are drawn on the last one."""
    paths = result.question.images
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        boxes = [_labelled(box) for box in result.answer.boxes] if path == paths[-1] else []
        yield draw_boxes(image, boxes)


def _labelled(box: Box) -> Box:
    """Remove the box's ref, which would be its label, if no font can draw it."""
    return box if box.ref is None or can_draw(box.ref) else replace(box, ref=None)


def _text(result: Result) -> _Lines:
    width = len(result.question.images) * (SIDE + GAP) - GAP
    answer = parse_boxes(result.answer.text).text
    verdict = (_RIGHT, "right") if result.right else (_WRONG, "wrong")
    return [
        *((_SOFT, line) for line in _wrapped(result.question.turn.question, width)),
        *((_INK, line) for line in _wrapped(answer, width)),
        verdict,
    ]


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap text to `width` pixels at spaces and between Chinese characters; words wider than a line are split."""
    text = " ".join(text.split())
    if not can_draw(text):
        text = _NO_FONT
    font = font_for(text, _FONT_SIZE)
    lines = [""]
    # A run of Latin characters with the space after it, or one other character.
    for word in re.findall(r"[!-\u024f]+ ?|.", text):
        # A word wider than a line is broken at any character.
        for part in [word] if font.getlength(word.rstrip()) <= width else word:
            if font.getlength(lines[-1] + part.rstrip()) > width:
                lines.append("")
            lines[-1] += part
    return [line.rstrip() for line in lines]
