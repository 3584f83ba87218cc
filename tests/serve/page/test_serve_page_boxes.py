"""Boxes on the chat page: their positions, the words that they belong to, the saved image."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from serve_page_driver import Page, image_file
from serve_page_server import Gate, PageServer

from paddlemix_qwenvl_plugin.processing.boxes import parse_boxes

ANSWER = (
    "<ref>a dog</ref><box>(100,200),(600,900)</box> with <ref>two balls</ref><box>(150,250),(250,350)</box>"
    "<box>(400,300),(550,450)</box>, and <quad>(700,100),(950,150),(900,400),(720,380)</quad>"
)
BLUE = (0, 114, 178)  # the colour of the first box


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("size", [(300, 200), (100, 400)])
def test_positions_of_boxes(
    page: Page, server: PageServer, tmp_path: Path, width: int, size: tuple[int, int]
) -> None:
    server.answers.append([ANSWER])
    page.open(width)
    page.ask("What is there?", image_file(tmp_path, size=size))
    ((left, top, right, bottom),) = page.rectangles(".frame img")
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=0.02)
    drawn = page.js(
        "return [...document.querySelectorAll('.frame .line')].map(shape => [...shape.points]"
        ".map(point => point.matrixTransform(shape.getScreenCTM())).map(point => [point.x, point.y]))"
    )
    boxes = parse_boxes(ANSWER).boxes
    assert len(drawn) == len(boxes) == 4
    for box, corners in zip(boxes, drawn):
        points = list(box.points)
        if box.kind == "box":
            (x1, y1), (x2, y2) = points
            points = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
        expected = [[left + x * (right - left) / 1000, top + y * (bottom - top) / 1000] for x, y in points]
        assert corners == [pytest.approx(corner, abs=0.6) for corner in expected]
    # A screenshot, of the whole page, has the box's colour on the left side of the first box.
    page.js(
        "document.querySelector('.frame').scrollIntoView({block: 'start'}); document.activeElement.blur()"
    )
    pixels = page.browser.screenshot()
    scrolled = page.js("return scrollY")
    box_left, _, _, box_bottom = page.rectangles(".frame .line")[0]
    x, y = round(box_left), round(box_bottom - 20 + scrolled)
    assert np.abs(pixels[y, x - 2 : x + 3] - BLUE).max(axis=1).min() <= 8


def test_each_box_is_drawn_when_it_is_complete(page: Page, server: PageServer, tmp_path: Path) -> None:
    within_box, within_ref = Gate(), Gate()
    server.answers.append(
        ["<re", "f>a dog</ref><box>(1,2),(3", within_box, "0,40)</box> and <ref>a cat", within_ref,
         "</ref><box>(500,500),(600,600)</box>"]
    )  # fmt: skip
    page.open()
    page.attach(image_file(tmp_path))
    page.type("What is there?\n")
    page.wait(lambda: page.answers() == ["a dog"])
    assert page.find_all("figure") == []
    within_box.open()
    page.wait(lambda: page.answers() == ["a dog and a cat"])
    assert len(page.find_all(".frame .line")) == 1
    assert page.find("figure img").get_attribute("alt") == "Image 1: scene.png, with a box"
    within_ref.open()
    page.wait_for_end()
    assert page.answers() == ["a dog and a cat"]
    assert len(page.find_all(".frame .line")) == 2
    assert page.find("figure img").get_attribute("alt") == "Image 1: scene.png, with 2 boxes"


def highlighted(page: Page) -> tuple[list[str], list[int]]:
    """The highlighted words and the numbers of the highlighted boxes."""
    words = page.js(
        "return [...document.querySelectorAll('.has-boxes.highlighted')].map(e => e.firstChild.data)"
    )
    boxes = page.js(
        "return [...document.querySelectorAll('.box')]"
        ".flatMap((e, i) => e.classList.contains('highlighted') ? [i + 1] : [])"
    )
    return words, boxes


def test_words_and_boxes_are_highlighted_together(page: Page, server: PageServer, tmp_path: Path) -> None:
    server.answers.append([ANSWER])
    page.open()
    page.ask("What is there?", image_file(tmp_path, size=(300, 200)))
    mouse = ActionChains(page.browser.driver, duration=0)
    dog, balls, _ = page.find_all(".has-boxes")
    image = page.find(".frame")
    width, height = image.size["width"], image.size["height"]

    def move_to(x: int, y: int) -> ActionChains:
        """Move the mouse to a position in thousandths of the image."""
        return mouse.move_to_element_with_offset(image, (x - 500) * width // 1000, (y - 500) * height // 1000)

    mouse.move_to_element(balls).perform()
    assert highlighted(page) == (["two balls"], [2, 3])
    mouse.move_to_element(dog).perform()
    assert highlighted(page) == (["a dog"], [1])
    # Inside the dog's box; inside a ball's box, which lies within the dog's box; outside of all boxes.
    move_to(300, 800).perform()
    assert highlighted(page) == (["a dog"], [1])
    move_to(200, 320).perform()
    assert highlighted(page) == (["two balls"], [2])
    assert page.find_all(".box-badge")[1].text == "2two balls"
    move_to(660, 950).perform()
    assert highlighted(page) == ([], [])
    # A click on a box keeps it highlighted; a click elsewhere ends this.
    move_to(500, 400).click().perform()
    mouse.move_to_element(page.find(".bar")).perform()
    assert highlighted(page) == (["two balls"], [3])
    mouse.click().perform()
    assert highlighted(page) == ([], [])
    page.find_all(".box-badge")[1].click()
    assert page.js("return document.activeElement.ariaLabel") == "Box 2: two balls"


def test_tap_on_a_phone(page: Page, server: PageServer, tmp_path: Path) -> None:
    server.answers.append([ANSWER])
    page.open(360)
    page.ask("What is there?", image_file(tmp_path, size=(300, 200)))

    def tap(selector: str, index: int = 0) -> None:
        page.js(
            "document.querySelectorAll(arguments[0])[arguments[1]].scrollIntoView({block: 'center'})",
            selector,
            index,
        )
        left, top, right, bottom = page.rectangles(selector)[index]
        point = {"x": (left + right) / 2, "y": (top + bottom) / 2}
        page.browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
        page.browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    tap(".has-boxes", 1)
    page.wait(lambda: highlighted(page) == (["two balls"], [2, 3]))
    tap(".box", 3)
    page.wait(lambda: highlighted(page) == ([""], [4]))
    tap(".question .words")
    page.wait(lambda: highlighted(page) == ([], []))


def test_boxes_are_drawn_on_the_last_image(page: Page, server: PageServer, tmp_path: Path) -> None:
    server.answers += [[ANSWER], ["<box>(1,2),(30,40)</box>"], [ANSWER]]
    page.open()
    page.ask("What is there?", image_file(tmp_path, "one.png"), image_file(tmp_path, "two.png", seed=1))
    page.ask("And here?", image_file(tmp_path, "three.png", seed=2))
    page.ask("Again?")
    captions = [caption.text for caption in page.find_all("figcaption")]
    assert captions == ["Image 2 · two.png", "Image 3 · three.png", "Image 3 · three.png"]
    sources = page.js("return [...document.querySelectorAll('.thumbs img, .frame img')].map(i => i.src)")
    # In the order of the page: thumbnails of a question, then the image with the boxes of its answer.
    thumbnail_1, thumbnail_2, boxes_1, thumbnail_3, boxes_2, boxes_3 = sources
    assert thumbnail_1 != thumbnail_2 == boxes_1 != thumbnail_3 == boxes_2 == boxes_3


def test_retry_removes_the_earlier_boxes(page: Page, server: PageServer, tmp_path: Path) -> None:
    gate = Gate()
    server.answers += [[ANSWER], [gate, "<ref>one</ref><box>(1,2),(300,400)</box>"]]
    page.open()
    page.ask("What is there?", image_file(tmp_path))
    page.click("[data-words-label=retry]")
    page.wait(lambda: page.find_all("figure") == [])
    gate.open()
    page.wait_for_end()
    assert len(page.find_all(".frame .line")) == len(page.find_all(".box-badge")) == 1


def test_answer_with_boxes_but_no_image(page: Page, server: PageServer) -> None:
    server.answers.append([ANSWER])
    page.open()
    page.ask("What is there?")
    page.find_all(".has-boxes")[0].click()
    assert page.answers() == [parse_boxes(ANSWER).text]
    assert page.find_all("figure") == []


@pytest.mark.parametrize("size", [(200, 100), (900, 450)])
def test_saved_image(page: Page, server: PageServer, tmp_path: Path, size: tuple[int, int]) -> None:
    server.answers.append(["<ref>a dog</ref><box>(250,400),(750,900)</box>"])
    page.open()
    source = image_file(tmp_path, size=size)
    page.ask("Where?", source)
    page.click("figure [data-words-label='save.image']")
    data = page.downloaded(".png")
    with Image.open(io.BytesIO(data)) as saved, Image.open(source) as original:
        scale = saved.width // original.width
        assert saved.size == (original.width * scale, original.height * scale)
        assert saved.width >= 768  # the longer side is enlarged to at least MIN_LONG_SIDE of png.js
        pixels = np.asarray(saved.convert("RGB"), np.int16)
        scaled = np.asarray(original.resize(saved.size, Image.Resampling.BICUBIC), np.int16)
    height, width, _ = pixels.shape
    left, top, right, bottom = width // 4, height * 4 // 10, width * 3 // 4, height * 9 // 10  # of the box
    middle_y, middle_x = (top + bottom) // 2, (left + right) // 2
    for y, x in ((middle_y, left), (middle_y, right), (bottom, middle_x), (top, right - 20)):
        assert np.abs(pixels[y, x] - BLUE).max() <= 3
    # The label above the corner has the box's colour; the image beside the box is unchanged; the box is not filled.
    assert np.abs(pixels[top - 4, left + 2] - BLUE).max() <= 3
    assert np.abs(pixels[:, : left - 20] - scaled[:, : left - 20]).mean() < 3
    assert np.abs(pixels[top + 20 : bottom - 20, left + 20 : right - 20] - BLUE).max(axis=2).min() > 3


def random_answer(rng: random.Random) -> str:
    """Answer of complete and incomplete tags."""
    fragments = [
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<quad>",
        "</quad>",
        " ",
        "a dog",
        "狗",
        "<",
        "<bo",
        "(",
        ",",
        "7",
    ]
    complete_tags = [
        "<ref>{}</ref>",
        "<box>({},{}),({},{})</box>",
        "<quad>({},{}),({},{}),({},{}),( {} , {} )</quad>",
    ]
    parts = []
    for _ in range(rng.randrange(12)):
        part = rng.choice(fragments if rng.random() < 0.4 else complete_tags)
        numbers = [rng.choice([-5, 0, 7, 500, 1000, 1234567, 2000]) for _ in range(part.count("{}"))]
        parts.append(part.format(*numbers))
    return "".join(parts)


def test_page_parses_answers_like_parse_boxes(page: Page) -> None:
    rng = random.Random(15)
    answers = [random_answer(rng) for _ in range(2000)]
    page.open()
    results = page.browser.driver.execute_async_script(
        "const [answers, done] = arguments;"
        "import('/answer_text.js').then(({parseAnswer}) => done(answers.map(text => {"
        " const {segments, boxes} = parseAnswer(text);"
        " const linked = segments.flatMap(s => s.boxes.map(b => [b.number, s.isRef ? s.text.trim() : null]));"
        " return [segments.map(s => s.text).join(''), boxes.map(b => [b.kind, b.points, b.ref]), linked]; })))",
        answers,
    )
    n_boxes = 0
    for answer, (text, boxes, linked) in zip(answers, results):
        parsed = parse_boxes(answer)
        assert text == parsed.text, answer
        expected_boxes = [[box.kind, [list(point) for point in box.points], box.ref] for box in parsed.boxes]
        assert boxes == expected_boxes, answer
        assert sorted(linked) == [[i, box.ref] for i, box in enumerate(parsed.boxes, 1)], answer
        n_boxes += len(boxes)
    assert n_boxes > 1000


def test_incomplete_tags_are_not_shown(page: Page) -> None:
    """The text shown for each prefix of an answer contains no part of a tag, and stays when the answer grows.

    A `<` at the end of a prefix, which may begin a tag, is not shown yet. (The check would also accept that spaces and
    a `<` at the end of the text disappear again.)
    """
    page.open()
    texts = page.browser.driver.execute_async_script(
        "const [text, done] = arguments;"
        "import('/answer_text.js').then(({parseAnswer}) => done([...text].map((_, i) =>"
        " parseAnswer(text.slice(0, i + 1), false).segments.map(s => s.text).join(''))))",
        ANSWER + " x < 3",
    )
    assert texts[-1] == parse_boxes(ANSWER).text + " x < 3"
    for before, after in zip(texts, texts[1:]):
        assert after.startswith(before.removesuffix(" <").rstrip()), (before, after)
        assert ">" not in after
        assert "(" not in after
