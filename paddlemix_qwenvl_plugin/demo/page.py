"""HTML report of a demo run: one file, images embedded, no scripts, no external requests."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.demo.world.captions import caption_text
from paddlemix_qwenvl_plugin.processing.boxes import Box, parse_boxes
from paddlemix_qwenvl_plugin.processing.drawing import COLOURS
from paddlemix_qwenvl_plugin.runtime.answer import Answer
from paddlemix_qwenvl_plugin.util.program import program
from paddlemix_qwenvl_plugin.version import __version__

_HERE = Path(__file__).resolve().parent
_HTML_LANGUAGE = {"en": "en", "zh": "zh-Hans"}  # values of the attribute `lang`
# Size of a box's number label, in thousandths of the image.
_LABEL_WIDTH, _LABEL_HEIGHT = 52, 58


def html_page(run: Run, out: Path) -> str:
    """Render a run as HTML. The page's example command uses the stages and images in the folder `out`."""
    import paddle

    return _template("page.html").substitute(
        right=run.right,
        total=len(run.results),
        images=sum(len(result.question.images) for result in run.results),
        cards="\n".join(_card(result) for result in run.results),
        colours="\n".join(f".c{i}{{--box:{colour}}}" for i, colour in enumerate(COLOURS)),
        parameters=f"{run.parameters / 1e6:.1f} million",
        export_seconds=f"{run.export_seconds:.1f} s",
        answer_seconds=f"{run.answer_seconds:.1f} s",
        tokens_per_second=f"{_tokens_per_second(run.results):.0f}",
        paddle=escape(paddle.__version__),
        plugin=escape(__version__),
        qwenvl=escape(program()),
        vision=escape(shlex.quote(str(out / "vision" / "vision"))),
        language=escape(shlex.quote(str(out / "text" / "qwen"))),
        image=escape(shlex.quote(str(out / "images" / "caption.png"))),
    )


def _template(name: str) -> Template:
    """Read a template without its comments, which are for its readers only."""
    return Template(re.sub(r"<!--.*?-->\n", "", (_HERE / name).read_text("utf-8"), flags=re.DOTALL))


def _card(result: Result) -> str:
    question, answer = result.question, result.answer
    expected = parse_boxes(question.turn.answer).text
    return _template("card.html").substitute(
        name=question.name,
        width="wide" if len(question.images) > 1 else "",
        title=escape(question.title),
        images="".join(_figure(result, number) for number in range(len(question.images))),
        language=_HTML_LANGUAGE[question.turn.language],
        question=escape(question.turn.question),
        answer=_marked(answer) or "(nothing)",
        verdict="right" if result.right else "wrong",
        expected="" if result.right else f'<p class="expected">Correct answer: {escape(expected)}</p>',
        raw=escape(answer.text),
        seconds=f"{result.seconds:.2f}",
    )


def _figure(result: Result, number: int) -> str:
    """Figure of one image of the question. The answer's boxes refer to the last image and are drawn there."""
    question = result.question
    n_images = len(question.images)
    boxes = result.answer.boxes if number == n_images - 1 else ()
    image = _image(question.images[number], caption_text(question.sample.scenes[number], "en"), boxes)
    caption = f"<figcaption>Picture {number + 1}</figcaption>" if n_images > 1 else ""
    return f"<figure>{image}{caption}</figure>"


def _image(path: Path, description: str, boxes: Sequence[Box]) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    overlay = "".join(_outline(number, box) for number, box in enumerate(boxes))
    return (
        f'<div class="image"><img alt="{escape(description)}" src="data:image/png;base64,{data}">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{overlay}</svg></div>'
    )


def _outline(number: int, box: Box) -> str:
    points = " ".join(f"{x},{y}" for x, y in _corners(box))
    left, top = min(x for x, _ in box.points), min(y for _, y in box.points)
    # The number is drawn above the box, or inside it if there is no room.
    y = top - _LABEL_HEIGHT if top >= _LABEL_HEIGHT else top
    # The baseline is below the label's upper edge by the font size in page.html, 44 thousandths.
    text_x, baseline = left + _LABEL_WIDTH // 2, y + 44
    return (
        f'<g class="{_css_class(number)}"><polygon points="{points}"/>'
        f'<rect x="{left}" y="{y}" width="{_LABEL_WIDTH}" height="{_LABEL_HEIGHT}"/>'
        f'<text x="{text_x}" y="{baseline}">{number + 1}</text></g>'
    )


def _corners(box: Box) -> Sequence[tuple[int, int]]:
    if box.kind == "quad":
        return box.points
    (left, top), (right, bottom) = box.points
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _css_class(number: int) -> str:
    return f"c{number % len(COLOURS)}"


def _marked(answer: Answer) -> str:
    """HTML of the answer's text: each ref with its box's number and colour, other boxes at the end."""
    text = parse_boxes(answer.text).text
    html, position, boxes_without_ref = "", 0, ""
    for number, box in enumerate(answer.boxes):
        start = text.find(box.ref, position) if box.ref else -1
        badge = f'<mark class="{_css_class(number)}"><b>{number + 1}</b>'
        if box.ref and start >= 0:
            html += f"{escape(text[position:start])}{badge}&nbsp;{escape(box.ref)}</mark>"
            position = start + len(box.ref)
        else:
            corners = " ".join(f"({x},{y})" for x, y in box.points)
            boxes_without_ref += f" {badge}&nbsp;{corners}</mark>"
    return html + escape(text[position:]) + boxes_without_ref


def _tokens_per_second(results: Sequence[Result]) -> float:
    # Prefill computes the first token.
    decoded = sum(len(result.answer.token_ids) - 1 for result in results)
    return decoded / max(sum(result.answer.timings["decode"] for result in results), 1e-9)
