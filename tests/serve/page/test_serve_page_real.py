"""The chat page in Chromium with a real server of the demo model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chromium import Browser
from engines import needs_compiler
from serve_page_driver import Page
from serve_process import ServerProcess, checked_records, wait_until_idle

from paddlemix_qwenvl_plugin import QwenVL
from paddlemix_qwenvl_plugin.demo.questions import QUESTIONS
from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has"),
]

# A question whose answer has one box.
(LOCATE,) = (question for question in QUESTIONS if question.name == "locate")


def _shown_answer(page: Page) -> tuple[str, list[list[float]]]:
    """The words of the last answer, and its box on the image in thousandths."""
    ((left, top, right, bottom),) = page.rectangles(".turn:last-child .frame img")
    ((x1, y1, x2, y2),) = page.js(
        "return [...document.querySelectorAll('.turn:last-child .frame .line')].map(shape => {"
        " const corners = [...shape.points].map(point => point.matrixTransform(shape.getScreenCTM()));"
        " const of = (axis, pick) => pick(...corners.map(corner => corner[axis]));"
        " return [of('x', Math.min), of('y', Math.min), of('x', Math.max), of('y', Math.max)]; })"
    )
    width, height = (right - left) / 1000, (bottom - top) / 1000
    corners = [[(x1 - left) / width, (y1 - top) / height], [(x2 - left) / width, (y2 - top) / height]]
    return page.answers()[-1], corners


def _check(page: Page, local_model: QwenVL) -> None:
    """Raise AssertionError unless the last answer equals that of QwenVL without a server, box included."""
    answer = local_model.generate(
        [{"image": str(LOCATE.images[0])}, {"text": LOCATE.turn.question}], chat=True
    )
    (box,) = answer.boxes
    words, corners = _shown_answer(page)
    assert words == parse_boxes(answer.text).text
    assert corners == [pytest.approx(list(point), abs=3) for point in box.points]


def test_answer_stop_and_retry_after_the_engine_is_killed(
    page_browser: Browser, serve_demo: Callable[..., ServerProcess], local_model: QwenVL, tmp_path: Path
) -> None:
    process = serve_demo()
    url = process.wait_until_ready()
    # What Page reads of a PageServer, the mock server of the other tests.
    server: Any = SimpleNamespace(url=f"{url}/", ready_status=200, key=None)
    page = Page(page_browser, server, tmp_path)
    page.open()
    assert page.find("#model").text == "qwen-vl-chat"
    page.ask(LOCATE.turn.question, LOCATE.images[0])
    _check(page, local_model)
    assert "tokens" in page.note()

    pid = process.engine_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # otherwise the answer could be complete before the click on #stop
    page.type("And now?\n")
    page.wait(lambda: page.find("#stop").is_displayed())
    page.click("#stop")
    page.wait_for_end()
    assert page.note() == "Stopped"
    os.kill(pid, signal.SIGCONT)
    wait_until_idle(url)

    os.kill(pid, signal.SIGSTOP)  # so that the answer is not complete before the process is killed
    page.attach(LOCATE.images[0])
    page.type(LOCATE.turn.question + "\n")
    page.wait(lambda: page.find_all(".answer.running"))
    os.kill(pid, signal.SIGKILL)
    page.wait_for_end()
    explanation, message, button = page.error()
    assert explanation == "The server is not ready. Try again in 1 second."
    assert message.startswith("the engine process was killed (SIGKILL)")
    assert button == "Retry"
    page.wait(lambda: page.find("#state").text == "Ready")
    page.find_all(".answer-body > .problem button")[-1].click()
    page.wait_for_end()
    _check(page, local_model)
    assert page.problems() == []
    process.send_signal(signal.SIGTERM)
    code, log = process.wait_for_exit()
    assert code == 0
    checked_records(log)
