"""The demo's page in Chromium, on a desktop and a phone, in light and dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser, needs_chromium
from demo_helpers import make_answer, question_named
from PIL import ImageColor

from paddlemix_qwenvl_plugin.demo.page import html_page
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.processing.drawing import COLOURS

pytestmark = needs_chromium

WIDTHS = (1280, 360)

# JavaScript expression that opens all <details>.
OPEN_DETAILS = "document.querySelectorAll('details').forEach(d => d.open = true)"

# JavaScript that returns [WCAG contrast ratio, text, luminance of the background] for each text that is not in an SVG
# image. A text's background is that of the nearest element around it whose background is not transparent.
CONTRASTS = """
const luminance = colour => {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const parsed = css => css.match(/[\\d.]+/g).map(Number);
const ratios = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest('svg')) continue;
  let ancestor = element, background;
  do {
    background = parsed(getComputedStyle(ancestor).backgroundColor);
    ancestor = ancestor.parentElement;
  } while (background.length === 4 && background[3] === 0 && ancestor);
  if (background.length === 4) throw new Error('a background that is half transparent');
  const [a, b] = [luminance(parsed(getComputedStyle(element).color)), luminance(background)];
  ratios.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walker.currentNode.data.trim(), b]);
}
return ratios;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, all_correct_run: Run) -> Path:
    """Page with right answers and a wrong one: long words, a box around the whole image, a quadrilateral and HTML."""
    wrong_answer = (
        f"{'x' * 300} <ref>{'一' * 200}</ref><box>(0,0),(1000,1000)</box>"
        "<quad>(500,100),(900,500),(500,900),(100,500)</quad><script>alert(1)</script>"
    )
    results = (*all_correct_run.results, Result(question_named("count"), make_answer(wrong_answer)))
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(
        html_page(Run(results, parameters=1_000_000, export_seconds=1.0), Path("a" * 60)), "utf-8"
    )
    return path


def test_every_image_loads(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    sizes = browser.js("return [...document.images].map(i => [i.complete, i.naturalWidth, i.width > 200])")
    # Nine images of the eight questions, and one of the wrong answer.
    assert sizes == [[True, 256, True]] * 10


def test_no_requests_and_no_console_messages(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.js(OPEN_DETAILS)
    requests = browser.requests()
    assert page.as_uri() in requests
    assert [url for url in requests if not url.startswith("data:") and url != page.as_uri()] == []
    assert browser.driver.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_positions_of_boxes(browser: Browser, page: Path, all_correct_run: Run, width: int) -> None:
    """Compare the polygons' positions with the answers' boxes, and pixels on the boxes' sides with COLOURS."""
    browser.open(page.as_uri(), width)
    pixels = browser.screenshot()
    n_checked = 0
    rectangles = (
        ".map(e => e.getBoundingClientRect())"
        ".map(r => [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY])"
    )
    for result in all_correct_run.results:
        card = f"document.getElementById('{result.question.name}')"
        *_, last_image = browser.js(f"return [...{card}.querySelectorAll('img')]{rectangles}")
        polygons = browser.js(f"return [...{card}.querySelectorAll('polygon')]{rectangles}")
        assert len(polygons) == len(result.answer.boxes)
        left, top, right, bottom = last_image
        assert right - left == pytest.approx(bottom - top, abs=0.5)
        for number, (box, polygon) in enumerate(zip(result.answer.boxes, polygons)):
            # From thousandths of the image to pixels of the page.
            x1, y1, x2, y2 = expected = [
                start + value * (end - start) / 1000
                for point in box.points
                for value, start, end in zip(point, (left, top), (right, bottom))
            ]
            assert polygon == pytest.approx(expected, abs=2.5)
            # Points on the left, right, upper and lower side.
            points = [
                (x1, (y1 + y2) / 2),
                (x2, (y1 + y2) / 2),
                ((x1 + 3 * x2) / 4, y1),
                ((3 * x1 + x2) / 4, y2),
            ]
            colour = ImageColor.getrgb(COLOURS[number])
            for x, y in points:
                neighbourhood = pixels[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
                assert np.abs(neighbourhood - colour).max(axis=2).min() <= 8, (result.question.name, number)
            n_checked += 1
    assert n_checked == 8  # boxes of all answers


@pytest.mark.parametrize("width", WIDTHS)
def test_no_horizontal_scrolling(browser: Browser, page: Path, width: int) -> None:
    browser.open(page.as_uri(), width)
    browser.js(OPEN_DETAILS)
    inner, scroll, client = browser.js(
        "const e = document.documentElement; return [innerWidth, e.scrollWidth, e.clientWidth]"
    )
    assert (inner, scroll) == (width, client)
    # Commands scroll inside their frames; no other element is cut off at the right.
    cut_off = browser.js(
        "return [...document.querySelectorAll('main *')]"
        ".filter(e => !e.closest('.next pre') && !e.closest('svg'))"
        ".filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut_off == []


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_readable(browser: Browser, page: Path, width: int, color_scheme: str) -> None:
    browser.open(page.as_uri(), width, color_scheme)
    browser.js(OPEN_DETAILS)
    contrasts = browser.js(CONTRASTS)
    assert len(contrasts) > 60
    for ratio, text, background in contrasts:
        assert ratio >= 4.5, (ratio, text)  # the minimum of WCAG's level AA
        # A number is on the colour of its box. The background of other text is dark in dark mode, light in light mode.
        if not text.isdigit():
            assert background < 0.1 if color_scheme == "dark" else background > 0.7, text
    sizes = browser.js(
        "return [...document.querySelectorAll('p, dd, dt, pre, summary, h1, h2, span')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_the_raw_answer_opens(browser: Browser, page: Path, all_correct_run: Run) -> None:
    browser.open(page.as_uri())
    result = all_correct_run.results[1]
    card = f"document.getElementById('{result.question.name}')"
    is_visible = f"return {card}.querySelector('pre').checkVisibility()"
    assert not browser.js(is_visible)
    browser.js(f"{card}.querySelector('summary').click()")
    assert browser.js(is_visible)
    assert browser.js(f"return {card}.querySelector('pre').innerText") == result.answer.text


def test_two_images_are_side_by_side(browser: Browser, page: Path) -> None:
    for width in WIDTHS:
        browser.open(page.as_uri(), width)
        (_, first_top, first_right), (second_left, second_top, _) = browser.js(
            "return [...document.querySelectorAll('#pair img')].map(e => e.getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right])"
        )
        assert first_top == second_top
        assert first_right < second_left
