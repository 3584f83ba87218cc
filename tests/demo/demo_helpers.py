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


def answered(text: str) -> Answer:
    """Build an answer with this text to a question about a demo image."""
    parsed = parse_boxes(text)
    return Answer(
        text=text,
        boxes=tuple(parsed.boxes),
        image_size=(256, 256),
        problems=tuple(parsed.problems),
        token_ids=[0] * 29,
        finish_reason="stop",
        timings=dict(TIMINGS),
    )


def named(name: str) -> Question:
    (found,) = [question for question in QUESTIONS if question.name == name]
    return found


class Page(HTMLParser):
    """Elements of the page as (tag, attributes, the text inside)."""

    VOID = ("meta", "link", "img", "polygon", "rect", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
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
        opened = self.elements[self._open.pop()][0]
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def texts(self, tag: str, css: str = "") -> list[str]:
        """Text of each element with this tag and CSS class."""
        return [
            "".join(text).replace("\xa0", " ")
            for name, attributes, text in self.elements
            if name == tag and css in (attributes.get("class") or "")
        ]
