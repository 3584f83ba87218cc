"""Accessibility of the page: keyboard, screen reader, phone, dark mode, Chinese; and no text becomes HTML."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from serve_page_driver import Page, image_file
from serve_page_server import PAGE, Gate, PageServer, Refusal

TAB, ESCAPE, SPACE = "\ue004", "\ue00c", " "
ANSWER = "<ref>a dog</ref><box>(100,200),(600,900)</box> and <ref>a ball</ref><box>(700,600),(900,800)</box>."


@cache
def axe() -> str:
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("no axe-core: pip install -e '.[dev]'")
    return (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")


def findings(page: Page) -> list[str]:
    """Serious and critical findings of axe-core."""
    page.js(axe())
    result = page.browser.driver.execute_async_script("axe.run().then(arguments[0])")
    assert len(result["passes"]) > 15
    return [
        f"{found['id']}: {node['html']} {node.get('failureSummary')}"
        for found in result["violations"]
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


def conversation(page: Page, tmp_path: Path) -> None:
    page.server.plays += [[ANSWER], ["Yes."]]
    page.ask("What is there?", image_file(tmp_path))
    page.ask("Sure?")


def with_error(page: Page, tmp_path: Path) -> None:
    page.server.plays.append(Refusal(503, "the engine restarts"))
    page.ask("What is there?", image_file(tmp_path))


def while_editing(page: Page, tmp_path: Path) -> None:
    conversation(page, tmp_path)
    page.js("document.querySelector('[data-words-label=edit]').click()")


def with_words_lit(page: Page, tmp_path: Path) -> None:
    conversation(page, tmp_path)
    page.js("document.querySelector('.linked').focus()")


def with_key_dialog(page: Page, tmp_path: Path) -> None:
    page.server.key = "secret"
    page.ask("Hi")
    page.wait(lambda: page.find("#key-dialog").is_displayed())
    page.find("#key").send_keys("wrong\n")
    page.wait(lambda: page.find("#key-error").text)


@pytest.mark.parametrize(
    ("state", "options"),
    [
        (lambda page, path: None, {}),
        (conversation, {}),
        (conversation, {"color_scheme": "dark"}),
        (conversation, {"width": 360, "color_scheme": "dark", "language": "zh-CN"}),
        (conversation, {"width": 360}),
        (with_error, {}),
        (with_error, {"color_scheme": "dark", "language": "zh-CN"}),
        (while_editing, {}),
        (while_editing, {"color_scheme": "dark"}),
        (with_words_lit, {"color_scheme": "dark"}),
        (with_key_dialog, {}),
        (with_key_dialog, {"color_scheme": "dark"}),
    ],
    ids=["empty", "conversation", "dark", "phone-dark-chinese", "phone", "error", "error-dark-chinese", "editing",
         "editing-dark", "lit-dark", "key", "key-dark"],
)  # fmt: skip
def test_axe_finds_nothing_serious(
    page: Page, tmp_path: Path, state: Callable[[Page, Path], None], options: dict[str, object]
) -> None:
    page.open(**options)  # type: ignore[arg-type]
    state(page, tmp_path)
    assert findings(page) == []


LONG = (
    "x" * 300 + " <ref>" + "一" * 200 + "</ref><box>(0,0),(1000,1000)</box><box>(990,990),(1000,1000)</box>"
)


@pytest.mark.parametrize("width", [1280, 360])
def test_no_horizontal_scrolling(page: Page, server: PageServer, tmp_path: Path, width: int) -> None:
    server.plays += [[LONG], Refusal(400, "y" * 300)]
    page.open(width)

    def check() -> None:
        assert page.js("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
        out = page.js(
            "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&"
            " !e.closest('.visually-hidden, svg, .badge') && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML.slice(0, 99))"
        )
        assert out == []

    check()
    page.attach(*(image_file(tmp_path, f"{'n' * 80}{i}.png", (400, 100)) for i in range(3)))
    check()
    page.ask("z" * 300)
    for selector in (".linked", ".box-badge"):
        page.js("[...document.querySelectorAll(arguments[0])].at(-1).focus()", selector)
        check()
    page.ask("again")
    check()


def test_a_phone_does_not_zoom_into_fields(page: Page) -> None:
    page.open(360)
    page.js("document.getElementById('key-dialog').showModal()")
    assert page.js(
        "return [...document.querySelectorAll('textarea, input:not([type=file])')]"
        ".map(e => getComputedStyle(e).fontSize)"
    ) == ["16px", "16px"]
    small = page.js(
        "return [...document.querySelectorAll('button')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width < 24 || r.height < 24).length"
    )
    assert small == 0


def test_by_keyboard_alone(page: Page, server: PageServer, tmp_path: Path) -> None:
    """Every control that shows is reached by Tab, with a focus that shows; words and boxes lead to each other."""
    server.plays += [[ANSWER], ["again"]]
    page.open()
    page.attach(image_file(tmp_path))
    page.js("document.getElementById('question').focus()")
    page.press("What is there?\n")
    page.wait(lambda: page.all(".answer"))
    page.wait_for_end()
    expected = page.js(
        "return [...document.querySelectorAll('button, textarea, [tabindex]')]"
        ".filter(e => e.checkVisibility() && !e.disabled).length"
    )
    reached = []
    focused = "const e = document.activeElement; return e.id || e.ariaLabel || e.textContent"
    for _ in range(expected + 1):
        page.press(TAB)
        if page.js("return document.activeElement === document.body"):
            continue  # past the last one
        reached.append(page.js(focused))
        outline, border = page.js(
            "const e = document.activeElement, s = e => getComputedStyle(e).outlineStyle;"
            "return [s(e), s(e.closest('.entry') ?? e)]"
        )
        assert "solid" in (outline, border), reached
    assert len(reached) == expected
    assert reached[-1] == "question"
    page.js("document.querySelector('.linked').focus()")
    page.press("\n")
    assert page.js("return document.activeElement.ariaLabel") == "Box 1: a dog"
    page.press("\n")
    assert page.js("return document.activeElement.textContent").startswith("a dog")
    page.press(SPACE)
    assert page.js("return document.activeElement.ariaLabel") == "Box 1: a dog"
    page.js("document.querySelector('[data-words-label=retry]').focus()")
    page.press("\n")
    page.wait(lambda: page.answers() == ["again"])


def test_a_screen_reader_hears_whole_answers(page: Page, server: PageServer, tmp_path: Path) -> None:
    gate = Gate()
    server.plays.append(["<ref>a dog</ref>", gate, "<box>(1,2),(30,40)</box>", " runs."])
    page.open()
    page.attach(image_file(tmp_path))
    page.js(
        "window.heard = [];"
        "for (const region of document.querySelectorAll('[role=status], [role=alert], [aria-live]'))"
        " new MutationObserver(() => heard.push(region.textContent))"
        ".observe(region, {childList: true, subtree: true, characterData: true})"
    )
    page.type("What?\n")
    page.wait(lambda: page.answers() == ["a dog"])
    assert page.js("return heard") == ["Answering…"]
    gate.open()
    page.wait_for_end()
    page.wait(lambda: len(page.js("return heard")) == 2)
    assert page.js("return heard[1]") == "Answer with a box on the image: a dog runs."
    labels = page.js(
        "return [...document.querySelectorAll('textarea, input:not([type=file])')].map(e => e.labels.length)"
    )
    assert labels == [1, 1]
    headings = page.js("return [...document.querySelectorAll('h1, #turns h2')].map(e => e.textContent)")
    assert headings == ["Qwen-VL", "Question 1", "Answer 1"]


def test_chinese_by_the_browser_and_by_the_switch(page: Page, server: PageServer) -> None:
    server.plays += [["好"], Refusal(429, "full", {"Retry-After": "3"})]
    page.open(language="zh-CN")
    assert page.js("return document.documentElement.lang") == "zh-Hans"
    assert page.find("#question").get_attribute("placeholder") == "输入问题"
    page.ask("好吗？")
    page.ask("忙吗？")
    assert page.problem() == ["服务器繁忙，请在 3 秒后重试。", "full", "重试"]
    assert "1 个词元" in page.all(".note")[0].text
    page.click("#language")
    assert page.js("return document.documentElement.lang") == "en"
    assert page.problem() == ["The server is busy. Try again in 3 seconds.", "full", "Retry"]
    assert "1 token ·" in page.all(".note")[0].text
    page.open(language="zh-CN")  # the choice is kept
    assert page.js("return document.documentElement.lang") == "en"


def test_every_word_is_there_in_both_languages(page: Page) -> None:
    page.open()
    keys = page.browser.driver.execute_async_script(
        "Promise.all([import('/words_en.js'), import('/words_zh.js')])"
        ".then(([{en}, {zh}]) => arguments[0]([Object.keys(en), Object.keys(zh)]))"
    )
    assert keys[0] == keys[1]
    used = re.findall(r'data-words[a-z-]*="([^"]+)"', (PAGE / "index.html").read_text("utf-8"))
    assert len(used) > 25
    assert set(used) <= set(keys[0])
    sources = "".join(
        f.read_text("utf-8") for f in [*PAGE.glob("*.js"), PAGE / "index.html"] if "words_" not in f.name
    )
    built = ("state.", "error.")
    assert [key for key in keys[0] if key not in sources and not key.startswith(built)] == []


def test_dark(page: Page, server: PageServer) -> None:
    light = (
        "const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);"
        "return r + g + b"
    )
    page.open()
    assert page.js(light) > 650
    page.open(color_scheme="dark")
    assert page.js(light) < 120


@pytest.mark.parametrize("reduced", [True, False])
def test_reduced_motion(page: Page, server: PageServer, reduced: bool) -> None:
    gate = Gate()
    server.plays.append(["One ", gate, "two"])
    page.open(reduced_motion=reduced)
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["One "])
    moving = page.js("return document.getAnimations().filter(a => a.animationName === 'breathe').length")
    assert (moving == 0) == reduced
    gate.open()
    page.wait_for_end()


EVIL = "<img src=x onerror=hacked=1><script>hacked=1</script><svg onload=hacked=1>&lt;b&gt;</p>"


def test_nothing_that_is_said_becomes_html(page: Page, server: PageServer, tmp_path: Path) -> None:
    quoted = '"><script>hacked=1</script>'
    answer = f"{EVIL}<ref>{EVIL}</ref><box>(1,2),(300,400)</box><ref>{quoted}</ref><box>(5,5),(9,9)</box>"
    server.plays += [[answer], Refusal(400, EVIL)]
    page.open()
    tags = (
        "const count = {};"
        "for (const e of document.querySelectorAll('*')) count[e.tagName] = (count[e.tagName] ?? 0) + 1;"
        "return count"
    )
    before = page.js(tags)
    page.ask(EVIL, image_file(tmp_path, "<img src=x onerror=hacked=1>.png"))
    page.ask(EVIL)
    page.js("document.querySelector('.linked').focus()")
    assert page.answers()[0] == f"{EVIL}{EVIL}{quoted}"
    assert page.problem()[1] == EVIL
    assert (
        page.js("return [...document.querySelectorAll('.question .words')].map(e => e.textContent)")
        == [EVIL] * 2
    )
    after = page.js(tags)
    assert after["SCRIPT"] == before["SCRIPT"] == 1
    assert after["IMG"] == before["IMG"] + 2  # the thumbnail and the image with boxes
    assert page.js("return window.hacked === undefined && !document.querySelector('b, [onerror], [onload]')")


def test_no_script_or_style_in_the_html() -> None:
    html = (PAGE / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|https?://", html) == []
    for file in [*PAGE.glob("*.js"), *PAGE.glob("*.css")]:
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert (
            re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", text) == []
        ), file


def test_reading_further_up_is_left_in_peace(page: Page, server: PageServer) -> None:
    """The page follows an answer that grows, unless the user has scrolled away."""
    first, second = Gate(), Gate()
    server.plays.append(["line\n" * 100, first, "line\n" * 100, second, "end"])
    page.open()
    page.type("Go\n")
    far = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    page.wait(lambda: page.answers() and page.answers()[0].count("line") == 100)
    page.wait(lambda: page.js(far) < 2)
    first.open()
    page.wait(lambda: page.answers()[0].count("line") == 200)
    page.wait(lambda: page.js(far) < 2)
    page.js("scrollTo(0, 300)")
    second.open()
    page.wait_for_end()
    assert page.js("return scrollY") == 300
