"""Accessibility, languages, layouts and colour schemes of the chat page in Chromium; texts never become HTML."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from serve_page_driver import Page, image_file
from serve_page_server import PAGE, Gate, PageServer, Refusal

TAB, SPACE = "\ue004", " "  # as WebDriver takes them
ANSWER = "<ref>a dog</ref><box>(100,200),(600,900)</box> and <ref>a ball</ref><box>(700,600),(900,800)</box>."


@cache
def axe_source() -> str:
    """The JavaScript of axe-core, a library that checks the accessibility of a page."""
    spec = importlib.util.find_spec("axe_core_python")
    if spec is None or spec.origin is None:
        pytest.skip("no axe-core: pip install -e '.[dev]'")
    return (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")


def findings(page: Page) -> list[str]:
    """Serious and critical findings of axe-core."""
    page.js(axe_source())
    result = page.browser.driver.execute_async_script("axe.run().then(arguments[0])")
    assert len(result["passes"]) > 15  # axe-core has really checked the page
    return [
        f"{violation['id']}: {node['html']} {node.get('failureSummary')}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


# States of the page.


def conversation(page: Page, tmp_path: Path) -> None:
    page.server.answers += [[ANSWER], ["Yes."]]
    page.ask("What is there?", image_file(tmp_path))
    page.ask("Sure?")


def with_error(page: Page, tmp_path: Path) -> None:
    page.server.answers.append(Refusal(503, "the engine restarts"))
    page.ask("What is there?", image_file(tmp_path))


def while_editing(page: Page, tmp_path: Path) -> None:
    conversation(page, tmp_path)
    page.js("document.querySelector('[data-words-label=edit]').click()")


def with_highlight(page: Page, tmp_path: Path) -> None:
    conversation(page, tmp_path)
    page.js("document.querySelector('.has-boxes').focus()")


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
        (with_highlight, {"color_scheme": "dark"}),
        (with_key_dialog, {}),
        (with_key_dialog, {"color_scheme": "dark"}),
    ],
    ids=["empty", "conversation", "dark", "phone-dark-chinese", "phone", "error", "error-dark-chinese", "editing",
         "editing-dark", "highlight-dark", "key", "key-dark"],
)  # fmt: skip
def test_axe_finds_nothing_serious(
    page: Page, tmp_path: Path, state: Callable[[Page, Path], None], options: dict[str, object]
) -> None:
    page.open(**options)  # type: ignore[arg-type]
    state(page, tmp_path)
    assert findings(page) == []


# Long words without spaces, and boxes at the edges of the image.
LONG_ANSWER = (
    "x" * 300 + " <ref>" + "一" * 200 + "</ref><box>(0,0),(1000,1000)</box><box>(990,990),(1000,1000)</box>"
)


@pytest.mark.parametrize("width", [1280, 360])
def test_no_horizontal_scrolling(page: Page, server: PageServer, tmp_path: Path, width: int) -> None:
    server.answers += [[LONG_ANSWER], Refusal(400, "y" * 300)]
    page.open(width)

    def check() -> None:
        assert page.js("const e = document.documentElement; return e.scrollWidth - e.clientWidth") == 0
        too_far_right = page.js(
            "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&"
            " !e.closest('.visually-hidden, svg, .badge') && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML.slice(0, 99))"
        )
        assert too_far_right == []

    check()
    page.attach(*(image_file(tmp_path, f"{'n' * 80}{i}.png", (400, 100)) for i in range(3)))
    check()
    page.ask("z" * 300)
    for selector in (".has-boxes", ".box-badge"):
        page.js("[...document.querySelectorAll(arguments[0])].at(-1).focus()", selector)
        check()
    page.ask("again")
    check()


def test_sizes_on_a_phone(page: Page) -> None:
    """Phones zoom into fields with a font below 16 px; buttons smaller than 24 x 24 px are hard to hit."""
    page.open(360)
    page.js("document.getElementById('key-dialog').showModal()")
    assert page.js(
        "return [...document.querySelectorAll('textarea, input:not([type=file])')]"
        ".map(e => getComputedStyle(e).fontSize)"
    ) == ["16px", "16px"]
    n_small_buttons = page.js(
        "return [...document.querySelectorAll('button')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).filter(r => r.width < 24 || r.height < 24).length"
    )
    assert n_small_buttons == 0


def test_use_without_a_mouse(page: Page, server: PageServer, tmp_path: Path) -> None:
    """Tab reaches every visible control, and the focus is visible; Enter leads from words to their box and back.

    Space leads from words to their box, too, and Enter on a button presses it.
    """
    server.answers += [[ANSWER], ["again"]]
    page.open()
    page.attach(image_file(tmp_path))
    page.js("document.getElementById('question').focus()")
    page.press("What is there?\n")
    page.wait(lambda: page.find_all(".answer"))
    page.wait_for_end()
    n_controls = page.js(
        "return [...document.querySelectorAll('button, textarea, [tabindex]')]"
        ".filter(e => e.checkVisibility() && !e.disabled).length"
    )
    reached = []
    focused = "const e = document.activeElement; return e.id || e.ariaLabel || e.textContent"
    for _ in range(n_controls + 1):
        page.press(TAB)
        if page.js("return document.activeElement === document.body"):
            continue  # after the last control, the focus leaves the page once
        reached.append(page.js(focused))
        outline, entry_outline = page.js(
            "const e = document.activeElement, s = e => getComputedStyle(e).outlineStyle;"
            "return [s(e), s(e.closest('.entry') ?? e)]"
        )
        assert "solid" in (outline, entry_outline), reached
    assert len(reached) == n_controls
    assert reached[-1] == "question"
    page.js("document.querySelector('.has-boxes').focus()")
    page.press("\n")
    assert page.js("return document.activeElement.ariaLabel") == "Box 1: a dog"
    page.press("\n")
    assert page.js("return document.activeElement.textContent").startswith("a dog")
    page.press(SPACE)
    assert page.js("return document.activeElement.ariaLabel") == "Box 1: a dog"
    page.js("document.querySelector('[data-words-label=retry]').focus()")
    page.press("\n")
    page.wait(lambda: page.answers() == ["again"])


def test_screen_reader_announces_complete_answers(page: Page, server: PageServer, tmp_path: Path) -> None:
    """A screen reader reads changes of live regions; window.heard records them."""
    gate = Gate()
    server.answers.append(["<ref>a dog</ref>", gate, "<box>(1,2),(30,40)</box>", " runs."])
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


def test_language_of_the_browser_and_language_switch(page: Page, server: PageServer) -> None:
    server.answers += [["好"], Refusal(429, "full", {"Retry-After": "3"})]
    page.open(language="zh-CN")
    assert page.js("return document.documentElement.lang") == "zh-Hans"
    assert page.find("#question").get_attribute("placeholder") == "输入问题"
    page.ask("好吗？")
    page.ask("忙吗？")
    assert page.error() == ["服务器繁忙，请在 3 秒后重试。", "full", "重试"]
    assert "1 个词元" in page.find_all(".note")[0].text
    page.click("#language")
    assert page.js("return document.documentElement.lang") == "en"
    assert page.error() == ["The server is busy. Try again in 3 seconds.", "full", "Retry"]
    assert "1 token ·" in page.find_all(".note")[0].text
    page.open(language="zh-CN")  # the selected language is stored
    assert page.js("return document.documentElement.lang") == "en"


def test_all_texts_exist_in_both_languages(page: Page) -> None:
    """words_en.js and words_zh.js have the same keys, and the page's sources contain each key that is not composed."""
    page.open()
    english_keys, chinese_keys = page.browser.driver.execute_async_script(
        "Promise.all([import('/words_en.js'), import('/words_zh.js')])"
        ".then(([{en}, {zh}]) => arguments[0]([Object.keys(en), Object.keys(zh)]))"
    )
    assert english_keys == chinese_keys
    used = re.findall(r'data-words[a-z-]*="([^"]+)"', (PAGE / "index.html").read_text("utf-8"))
    assert len(used) > 25
    assert set(used) <= set(english_keys)
    files = [path for path in [*PAGE.glob("*.js"), PAGE / "index.html"] if "words_" not in path.name]
    sources = "".join(path.read_text("utf-8") for path in files)
    composed = ("state.", "error.")  # the page composes these keys, they are not literal in its sources
    assert [key for key in english_keys if key not in sources and not key.startswith(composed)] == []


def test_dark_color_scheme(page: Page) -> None:
    brightness = (  # 0 to 765
        "const [r, g, b] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);"
        "return r + g + b"
    )
    page.open()
    assert page.js(brightness) > 650
    page.open(color_scheme="dark")
    assert page.js(brightness) < 120


@pytest.mark.parametrize("reduced", [True, False])
def test_reduced_motion(page: Page, server: PageServer, reduced: bool) -> None:
    gate = Gate()
    server.answers.append(["One ", gate, "two"])
    page.open(reduced_motion=reduced)
    page.type("Go\n")
    page.wait(lambda: page.answers() == ["One "])
    n_animations = page.js(
        "return document.getAnimations().filter(a => a.animationName === 'breathe').length"
    )
    assert (n_animations == 0) == reduced
    gate.open()
    page.wait_for_end()


HTML = "<img src=x onerror=hacked=1><script>hacked=1</script><svg onload=hacked=1>&lt;b&gt;</p>"


def test_texts_never_become_html(page: Page, server: PageServer, tmp_path: Path) -> None:
    html_after_quote = '"><script>hacked=1</script>'
    answer = f"{HTML}<ref>{HTML}</ref><box>(1,2),(300,400)</box><ref>{html_after_quote}</ref><box>(5,5),(9,9)</box>"
    server.answers += [[answer], Refusal(400, HTML)]
    page.open()
    count_tags = (
        "const count = {};"
        "for (const e of document.querySelectorAll('*')) count[e.tagName] = (count[e.tagName] ?? 0) + 1;"
        "return count"
    )
    before = page.js(count_tags)
    page.ask(HTML, image_file(tmp_path, "<img src=x onerror=hacked=1>.png"))
    page.ask(HTML)
    page.js("document.querySelector('.has-boxes').focus()")
    assert page.answers()[0] == f"{HTML}{HTML}{html_after_quote}"
    assert page.error()[1] == HTML
    questions = page.js("return [...document.querySelectorAll('.question .words')].map(e => e.textContent)")
    assert questions == [HTML] * 2
    after = page.js(count_tags)
    assert after["SCRIPT"] == before["SCRIPT"] == 1
    assert after["IMG"] == before["IMG"] + 2  # the thumbnail and the image with boxes
    assert page.js("return window.hacked === undefined && !document.querySelector('b, [onerror], [onload]')")


def test_no_inline_code_and_no_external_addresses() -> None:
    html = (PAGE / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|https?://", html) == []
    for file in [*PAGE.glob("*.js"), *PAGE.glob("*.css")]:
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://"
        assert re.findall(forbidden, text) == [], file


def test_scrolling_follows_a_growing_answer_unless_the_user_scrolls_up(
    page: Page, server: PageServer
) -> None:
    first, second = Gate(), Gate()
    server.answers.append(["line\n" * 100, first, "line\n" * 100, second, "end"])
    page.open()
    page.type("Go\n")
    distance_to_end = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    page.wait(lambda: page.answers() and page.answers()[0].count("line") == 100)
    page.wait(lambda: page.js(distance_to_end) < 2)
    first.open()
    page.wait(lambda: page.answers()[0].count("line") == 200)
    page.wait(lambda: page.js(distance_to_end) < 2)
    page.js("scrollTo(0, 300)")
    second.open()
    page.wait_for_end()
    assert page.js("return scrollY") == 300
