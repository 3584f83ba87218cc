"""The demo's HTML page: questions, escaped answers, images and boxes."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import pytest
from demo_helpers import Page, make_answer, question_named
from PIL import Image

from paddlemix_qwenvl_plugin.demo.page import html_page
from paddlemix_qwenvl_plugin.demo.result import Result, Run

OUT = Path("qwenvl-demo")
# An answer with markup, entities, placeholders of the page's template and control characters.
MALICIOUS = (
    '</p></article></pre><script>alert(1)</script><img src=x onerror="alert(2)">'
    "&lt;b&gt; $$title $title ' \" <!-- ]]> \x00\x1b"
    "<ref>\"><svg onload='alert(3)'></ref><box>(100,200),(300,400)</box>"
)


def page_of(*results: Result) -> tuple[str, Page]:
    html = html_page(Run(results, parameters=1, export_seconds=1.0), OUT)
    return html, Page(html)


def test_an_answer_never_becomes_markup() -> None:
    question = question_named("locate")
    _, harmless_page = page_of(Result(question, make_answer("<ref>x</ref><box>(100,200),(300,400)</box>")))
    _, page = page_of(Result(question, make_answer(MALICIOUS)))
    expected_structure = [(tag, sorted(attributes)) for tag, attributes, _ in harmless_page.elements]
    assert [(tag, sorted(attributes)) for tag, attributes, _ in page.elements] == expected_structure
    assert page.texts("pre")[0] == MALICIOUS
    (shown,) = page.texts("p", "answer")
    assert shown.startswith('</p></article></pre><script>alert(1)</script><img src=x onerror="alert(2)">')
    assert shown.endswith("\"><svg onload='alert(3)'>")


def test_page_has_no_requests_and_no_scripts(all_correct_run: Run) -> None:
    page = Page(html_page(all_correct_run, OUT))
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data"):
                assert (value or "").startswith("data:"), value
    css = "".join(page.texts("style"))
    assert "url(" not in css
    assert "@import" not in css
    (policy,) = [
        attributes["content"]
        for _, attributes, _ in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (policy or "").startswith("default-src 'none'")


def test_images_are_the_bundled_ones(all_correct_run: Run) -> None:
    page = Page(html_page(all_correct_run, OUT))
    sources = [attributes["src"] for tag, attributes, _ in page.elements if tag == "img"]
    paths = [path for result in all_correct_run.results for path in result.question.images]
    assert len(sources) == len(paths) == 9
    for source, path in zip(sources, paths):
        content = base64.b64decode((source or "").removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as embedded, Image.open(path) as bundled:
            assert embedded.tobytes() == bundled.tobytes()


def test_images_have_alternative_texts(all_correct_run: Run) -> None:
    page = Page(html_page(all_correct_run, OUT))
    alt = [attributes["alt"] for tag, attributes, _ in page.elements if tag == "img"]
    assert (
        alt[0] == "A large blue heart, a small green triangle, a large blue star and a small blue triangle."
    )
    assert all(alt)


def test_question_answer_and_verdict(all_correct_run: Run) -> None:
    page = Page(html_page(all_correct_run, OUT))
    assert page.texts("h1") == ["8 of 8 answers are right"]
    assert page.texts("span", "verdict") == ["right"] * 8
    assert page.texts("p", "question") == [
        result.question.turn.question for result in all_correct_run.results
    ]
    assert page.texts("pre")[:8] == [result.answer.text for result in all_correct_run.results]
    assert (
        page.texts("p", "answer")[1]
        == '1 The word "CLOCK", 2 a large black cross and 3 a large purple cross.'
    )
    assert not page.texts("p", "expected")
    languages = [
        attributes.get("lang") for _, attributes, _ in page.elements if attributes.get("class") == "question"
    ]
    assert languages == ["en"] * 7 + ["zh-Hans"]


def test_corners_and_marks_of_boxes() -> None:
    text = "<ref>a</ref><box>(10,20),(300,400)</box><quad>(0,0),(500,10),(510,600),(5,590)</quad>"
    html, page = page_of(Result(question_named("locate"), make_answer(text)))
    polygons = [attributes["points"] for tag, attributes, _ in page.elements if tag == "polygon"]
    assert polygons == ["10,20 300,20 300,400 10,400", "0,0 500,10 510,600 5,590"]
    # A ref's text is marked once, with the number of its first box. The second box is listed by its corners at the end.
    assert page.texts("mark") == ["1 a", "2 (0,0) (500,10) (510,600) (5,590)"]
    assert html.count('class="c0"') == 2  # the box and its mark


def test_boxes_are_on_the_last_image() -> None:
    text = "<ref>a</ref><box>(10,20),(300,400)</box>"
    html, _ = page_of(Result(question_named("pair"), make_answer(text)))
    first, second = html.split("Picture 1</figcaption>")
    assert "<polygon" not in first
    assert "<polygon" in second


@pytest.mark.parametrize("text", ["", "No.", "There are two purple shapes.<box>(0,0),(9,9)</box>"])
def test_a_wrong_answer_is_shown_with_the_expected_answer(text: str) -> None:
    """No text, another text, and the right text with a box that the question does not ask for."""
    _, page = page_of(Result(question_named("count"), make_answer(text)))
    assert page.texts("h1") == ["0 of 1 answers are right"]
    assert page.texts("span", "verdict") == ["wrong"]
    assert page.texts("p", "expected") == ["Correct answer: There are two purple shapes."]
    assert page.texts("p", "answer")[0].strip()


def test_commands_on_the_page_are_quoted_and_begin_with_argv0(
    all_correct_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my <env>/bin/qwenvl", "demo"])
    page = Page(html_page(all_correct_run, Path("my <demo>")))
    assert any("--first_model_path 'my <demo>/vision/vision' " in text for text in page.texts("pre"))
    lines = "\n".join(page.texts("pre")).splitlines()
    # Indented lines continue a command.
    commands = [line for line in lines if "qwenvl" in line and not line.startswith("  ")]
    assert len(commands) == 4
    assert all(line.startswith("'my <env>/bin/qwenvl' ") for line in commands), commands
