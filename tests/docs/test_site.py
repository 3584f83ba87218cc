"""The documentation site builds without a warning, its links resolve, and its pages fetch nothing from elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from chromium import Browser, needs_chromium
from doc_helpers import REPO, blocks, headings

import paddlemix_qwenvl_plugin as plugin
from paddlemix_qwenvl_plugin.cli.main import app
from paddlemix_qwenvl_plugin.serve.settings import ServeSettings

ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


# What a browser fetches on its own, by tag.
FETCHED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "video": ("src", "poster"),
}


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: Any) -> None: ...


class Page(HTMLParser):
    """The anchors, links and fetched files of an HTML page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.fetched += [given[name] for name in FETCHED.get(tag, ()) if name in given]
        self.styles.append(given.get("style", ""))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_style:
            self.styles.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` does."""
    for module in ("mkdocs", "material", "mkdocs_static_i18n", "mkdocstrings_handlers.python", "jieba"):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            found = None
        if found is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def broken(pages: dict[Path, Page], site: Path) -> Iterator[str]:
    """The links and fetched files that do not exist in the site."""
    for path, page in pages.items():
        # The server shows 404.html under any address, so its links begin at the root.
        for link in page.links + page.fetched:
            if ELSEWHERE.match(link) or link.startswith(("mailto:", "data:")):
                continue
            name, _, fragment = unquote(link).partition("#")
            name = name.partition("?")[0]
            start = site if name.startswith("/") else path.parent
            target = (start / name.lstrip("/")).resolve() if name else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}: no such file"
            elif fragment and target in pages and fragment not in pages[target].anchors:
                yield f"{path.relative_to(site)}: {link}: no such anchor"


def test_links(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 50
    assert sum(len(page.links) for page in pages.values()) > 1000
    found = list(broken(pages, site.resolve()))
    assert not found, "\n".join(found)


def test_every_document_has_its_pages(site: Path) -> None:
    """In English, and in Chinese: translated, or the English text."""
    for document in (REPO / "docs").rglob("*.md"):
        name = document.relative_to(REPO / "docs").with_suffix(".html")
        if not document.stem.endswith(".zh"):
            assert (site / name).is_file()
            assert (site / "zh" / name).is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        # <link rel=canonical> would be a host name, too; there is none without a site_url.
        assert not [link for link in page.fetched if ELSEWHERE.match(link)], path
        assert not [
            style for style in page.styles if re.search(r"url\(['\"]?(?:https?:)?//|@import", style)
        ], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", path.read_text("utf-8")), path


def test_public_names_are_on_an_api_page(pages: dict[Path, Page], site: Path) -> None:
    anchors = {
        anchor for path, page in pages.items() if path.parent == site / "api" for anchor in page.anchors
    }
    for name in set(plugin.__all__) - {"__version__"}:
        assert f"{plugin.__name__}.{name}" in anchors, name
    assert "__version__" in anchors
    settings = f"{ServeSettings.__module__}.ServeSettings"
    for name, field in ServeSettings.model_fields.items():
        assert f"{settings}.{name}" in anchors, name
        assert str(field.description) in pages[site / "api" / "serve.html"].text, name


def test_c_header_is_on_its_page(pages: dict[Path, Page], site: Path) -> None:
    text = re.sub(r"\s", "", pages[site / "api" / "c.html"].text)
    header = (REPO / "csrc" / "include" / "qwenvl.h").read_text("utf-8")
    names = re.findall(r"\b(qvl_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL))
    assert len(names) > 20
    for name in names:
        assert f"{name}(" in text, name


def test_commands_are_on_their_page(pages: dict[Path, Page], site: Path) -> None:
    page = pages[site / "api" / "commands.html"]

    def check(command: Any, path: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            if not child.hidden:
                check(child, f"{path}-{name}")
        if not hasattr(command, "commands"):
            assert path in page.anchors
            for parameter in command.get_params(typer.Context(command)) if path != "qwenvl-serve" else ():
                if parameter.param_type_name == "option":
                    assert parameter.opts[0] in page.text, (path, parameter.opts)

    check(typer.main.get_command(app), "qwenvl")


@pytest.mark.parametrize(
    ("word", "page"), [("QWENVL_CACHE_DIR", "environment.html"), ("断电", "zh/batch.html")]
)
def test_search_finds(site: Path, word: str, page: str) -> None:
    """The index has the words of both languages, Chinese ones separated."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    separator = re.compile(index["config"]["separator"])
    texts = {entry["location"]: re.sub("<[^>]+>", " ", entry["text"]) for entry in index["docs"]}
    found = [location for location, text in texts.items() if word in separator.split(text)]
    assert any(location.startswith(page) for location in found), found


@needs_chromium
def test_search_in_a_browser(site: Path) -> None:
    """A word typed into the search field finds its page; no request leaves the site."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_address[1]}/"
        browser = Browser()
        try:
            browser.open(f"{origin}zh/index.html")
            browser.driver.find_element("css selector", "[data-md-component=search-query]").send_keys("断电")
            end = time.monotonic() + 60
            while not (hits := browser.driver.find_elements("css selector", "a.md-search-result__link")):
                assert time.monotonic() < end, "no result after 60 s"
                time.sleep(0.1)
            assert hits[0].get_attribute("href").startswith(f"{origin}zh/batch.html")
            requested = [
                message["params"]["request"]["url"]
                for message in (
                    json.loads(e["message"])["message"] for e in browser.driver.get_log("performance")
                )
                if message["method"] == "Network.requestWillBeSent"
            ]
            assert len(requested) > 3
            assert not [url for url in requested if not url.startswith((origin, "data:", "blob:"))]
        finally:
            browser.driver.quit()
            server.shutdown()


@pytest.mark.parametrize("chinese", sorted((REPO / "docs").rglob("*.zh.md")), ids=lambda path: path.name)
def test_translations_keep_step(chinese: Path) -> None:
    """The same levels of headings, code blocks, table rows and list items as in the English page."""
    english = chinese.with_name(chinese.name.replace(".zh.md", ".md"))
    texts = [path.read_text("utf-8") for path in (english, chinese)]

    def shape(text: str) -> list[object]:
        marks = (r"^- ", r"^\|", r"^!\[")
        return [
            [level for level, _ in headings(text)],
            *(len(re.findall(m, text, re.MULTILINE)) for m in marks),
        ]

    assert blocks(texts[0]) == blocks(texts[1])
    assert shape(texts[0]) == shape(texts[1])


def test_checker_finds_errors(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<h1 id='x'>A</h1>")
    (tmp_path / "b.html").write_text(
        "<a href='a.html#x'>right</a><a href='a.html#y'>no anchor</a><a href='c.html'>no file</a>"
        "<a href='#z'>no anchor</a><img src='no.png'><a href='https://example.org/'>elsewhere</a>"
    )
    found = {path: Page(path.read_text()) for path in tmp_path.glob("*.html")}
    assert [line.split(": ")[1] for line in broken(found, tmp_path)] == ["a.html#y", "c.html", "#z", "no.png"]
