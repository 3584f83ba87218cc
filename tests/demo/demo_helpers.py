"""Helpers for tests of the demo: synthetic answers, and a parser of the HTML report."""

from __future__ import annotations

from html.parser import HTMLParser

from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS, Question
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes
from paddlemix_qwenvl_plugin.runtime.answer import Answer

TIMINGS = {
    "prepare": 0.01,
    "load": 0.0,
    "encode_images": 0.1,
    "prefill": 0.1,
    "decode": 0.4,
    "tokens_per_second": 70.0,
}


def make_answer(text: str) -> Answer:
    """Make an answer with this text to a question about a demo image."""
    parsed = parse_boxes(text)
    return Answer(
        text=text,
        boxes=tuple(parsed.boxes),
        image_size=(256, 256),
        problems=tuple(parsed.problems),
        token_ids=[0] * 29,  # as many as in TIMINGS: one from the prefill, 70 per second in 0.4 s
        finish_reason="stop",
        timings=dict(TIMINGS),
    )


def question_named(name: str) -> Question:
    (question,) = [question for question in QUESTIONS if question.name == name]
    return question


class Page(HTMLParser):
    """Parsed HTML page; `elements` are (tag, attributes, parts of the text inside) in the page's order."""

    VOID = ("meta", "link", "img", "polygon", "rect", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []  # indices of the elements that are not closed yet
        self.feed(html)
        self.close()
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opening_tag, _, _ = self.elements[self._open.pop()]
        assert opening_tag == tag, f"</{tag}> closes <{opening_tag}>"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def texts(self, tag: str, css_class: str = "") -> list[str]:
        """Texts of the elements with this tag and CSS class; non-breaking spaces are returned as spaces."""
        return [
            "".join(text).replace("\xa0", " ")
            for element_tag, attributes, text in self.elements
            if element_tag == tag and css_class in (attributes.get("class") or "")
        ]
