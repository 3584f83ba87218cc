"""The demo's page in Chromium, on a desktop and a phone, in light and dark mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Browser, needs_chromium
from demo_helpers import answered, named
from PIL import ImageColor

from paddlemix_qwenvl_plugin.demo.page import html_page
from paddlemix_qwenvl_plugin.demo.result import Result, Run
from paddlemix_qwenvl_plugin.processing.drawing import COLOURS

pytestmark = needs_chromium

WIDTHS = (1280, 360)

# WCAG contrast ratio of each text with its nearest background, with the text.
CONTRASTS = """
const light = colour => {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const parsed = css => css.match(/[\\d.]+/g).map(Number);
const ratios = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest('svg')) continue;
  let behind = element, colour;
  do {
    colour = parsed(getComputedStyle(behind).backgroundColor);
    behind = behind.parentElement;
  } while (colour.length === 4 && colour[3] === 0 && behind);
  if (colour.length === 4) throw new Error('a background that is half transparent');
  const [a, b] = [light(parsed(getComputedStyle(element).color)), light(colour)];
  ratios.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walker.currentNode.data.trim(), light(colour)]);
}
return ratios;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, all_correct_run: Run) -> Path:
    """A page with right answers, and a wrong one with long words and boxes at the edges."""
    long = (
        f"{'x' * 300} <ref>{'一' * 200}</ref><box>(0,0),(1000,1000)</box>"
        "<quad>(500,100),(900,500),(500,900),(100,500)</quad><script>alert(1)</script>"
    )
    results = (*all_correct_run.results, Result(named("count"), answered(long)))
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html_page(Run(results, 1_000_000, 1.0), Path("a" * 60)), "utf-8")
    return path


def test_every_image_loads(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    sizes = browser.js("return [...document.images].map(i => [i.complete, i.naturalWidth, i.width > 200])")
    assert sizes == [[True, 256, True]] * 10


def test_nothing_is_requested_and_the_console_is_silent(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    requests = browser.requests()
    assert page.as_uri() in requests
    assert [url for url in requests if not url.startswith("data:") and url != page.as_uri()] == []
    assert browser.driver.get_log("browser") == []


@pytest.mark.parametrize("width", WIDTHS)
def test_boxes_are_where_the_answers_say(
    browser: Browser, page: Path, all_correct_run: Run, width: int
) -> None:
    """Check the positions of the elements and the colour of their pixels."""
    browser.open(page.as_uri(), width)
    pixels = browser.screenshot()
    checked = 0
    for result in all_correct_run.results:
        card = f"document.getElementById('{result.question.name}')"
        place = "r => [r.left + scrollX, r.top + scrollY, r.right + scrollX, r.bottom + scrollY]"
        *_, image = browser.js(
            f"return [...{card}.querySelectorAll('img')].map(e => e.getBoundingClientRect()).map({place})"
        )
        drawn = browser.js(
            f"return [...{card}.querySelectorAll('polygon')].map(e => e.getBoundingClientRect()).map({place})"
        )
        assert len(drawn) == len(result.answer.boxes)
        left, top, right, bottom = image
        assert right - left == pytest.approx(bottom - top, abs=0.5)
        for number, (box, corners) in enumerate(zip(result.answer.boxes, drawn)):
            wanted = [
                start + value * (end - start) / 1000
                for point in box.points
                for value, start, end in zip(point, (left, top), (right, bottom))
            ]
            assert corners == pytest.approx(wanted, abs=2.5)
            spots = [
                (wanted[0], (wanted[1] + wanted[3]) / 2),
                (wanted[2], (wanted[1] + wanted[3]) / 2),
                ((wanted[0] + 3 * wanted[2]) / 4, wanted[1]),
                ((3 * wanted[0] + wanted[2]) / 4, wanted[3]),
            ]
            colour = ImageColor.getrgb(COLOURS[number])
            for x, y in spots:
                around = pixels[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
                assert np.abs(around - colour).max(axis=2).min() <= 8, (result.question.name, number)
            checked += 1
    assert checked == 8


@pytest.mark.parametrize("width", WIDTHS)
def test_no_horizontal_scrolling(browser: Browser, page: Path, width: int) -> None:
    browser.open(page.as_uri(), width)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    inner, scroll, client = browser.js(
        "const e = document.documentElement; return [innerWidth, e.scrollWidth, e.clientWidth]"
    )
    assert (inner, scroll) == (width, client)
    # Commands scroll inside their frames; no other element exceeds its card.
    out = browser.js(
        "return [...document.querySelectorAll('main *')]"
        ".filter(e => !e.closest('.next pre') && !e.closest('svg'))"
        ".filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert out == []


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_readable(browser: Browser, page: Path, width: int, color_scheme: str) -> None:
    browser.open(page.as_uri(), width, color_scheme)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    ratios = browser.js(CONTRASTS)
    assert len(ratios) > 60
    for ratio, text, behind in ratios:
        assert ratio >= 4.5, (ratio, text)
        # Numbers have the colours of the boxes as background, other text that of the page.
        if not text.isdigit():
            assert behind < 0.1 if color_scheme == "dark" else behind > 0.7, text
    sizes = browser.js(
        "return [...document.querySelectorAll('p, dd, dt, pre, summary, h1, h2, span')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_the_raw_answer_opens(browser: Browser, page: Path, all_correct_run: Run) -> None:
    browser.open(page.as_uri())
    result = all_correct_run.results[1]
    card = f"document.getElementById('{result.question.name}')"
    shown = f"return {card}.querySelector('pre').checkVisibility()"
    assert not browser.js(shown)
    browser.js(f"{card}.querySelector('summary').click()")
    assert browser.js(shown)
    assert browser.js(f"return {card}.querySelector('pre').innerText") == result.answer.text


def test_two_images_are_side_by_side(browser: Browser, page: Path) -> None:
    for width in WIDTHS:
        browser.open(page.as_uri(), width)
        first, second = browser.js(
            "return [...document.querySelectorAll('#pair img')].map(e => e.getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right])"
        )
        assert first[1] == second[1]
        assert first[2] < second[0]
