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

# An absolute URL, with or without a scheme.
EXTERNAL_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
# A CSS rule that fetches a file from another host, or an import.
EXTERNAL_STYLE = re.compile(r"url\(['\"]?(?:https?:)?//|@import")

# Attributes, by tag, whose URLs a browser fetches when it shows a page.
FETCHED_ATTRIBUTES = {
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
    """HTTP handler that serves files and writes no log."""

    def log_message(self, *_: Any) -> None: ...


class Page(HTMLParser):
    """The anchors, links, fetched URLs, styles and text of an HTML page."""

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
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        self.fetched += [attributes[name] for name in FETCHED_ATTRIBUTES.get(tag, ()) if name in attributes]
        self.styles.append(attributes.get("style", ""))
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
            spec = importlib.util.find_spec(module)
        except ImportError:
            spec = None
        if spec is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site") / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPO,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # of the theme Material, about MkDocs 2
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def broken_links(pages: dict[Path, Page], site: Path) -> Iterator[str]:
    """Describe the links and fetched URLs whose file or anchor does not exist in the site."""
    for path, page in pages.items():
        for link in page.links + page.fetched:
            if EXTERNAL_URL.match(link) or link.startswith(("mailto:", "data:")):
                continue
            name, _, fragment = unquote(link).partition("#")
            name = name.partition("?")[0]
            # In 404.html, which a server shows at any address, links begin with a slash: the root of the site.
            base = site if name.startswith("/") else path.parent
            target = (base / name.lstrip("/")).resolve() if name else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}: no such file"
            elif fragment and target in pages and fragment not in pages[target].anchors:
                yield f"{path.relative_to(site)}: {link}: no such anchor"


def test_links(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 50
    assert sum(len(page.links) for page in pages.values()) > 1000
    broken = list(broken_links(pages, site.resolve()))
    assert not broken, "\n".join(broken)


def test_every_document_has_its_pages(site: Path) -> None:
    """An English page and a Chinese page, which has the English text if there is no translation."""
    for document in (REPO / "docs").rglob("*.md"):
        name = document.relative_to(REPO / "docs").with_suffix(".html")
        if not document.stem.endswith(".zh"):
            assert (site / name).is_file()
            assert (site / "zh" / name).is_file()


def test_nothing_is_fetched_from_other_hosts(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        # <link rel=canonical> has an absolute URL, which is not fetched; mkdocs.yml has no site_url, so there is none.
        assert not [url for url in page.fetched if EXTERNAL_URL.match(url)], path
        assert not [style for style in page.styles if EXTERNAL_STYLE.search(style)], path
    for path in site.rglob("*.css"):
        assert not EXTERNAL_STYLE.search(path.read_text("utf-8")), path


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


def test_c_functions_are_on_the_c_page(pages: dict[Path, Page], site: Path) -> None:
    text = re.sub(r"\s", "", pages[site / "api" / "c.html"].text)
    header = (REPO / "csrc" / "include" / "qwenvl.h").read_text("utf-8")
    names = re.findall(r"\b(qvl_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL))
    assert len(names) > 20
    for name in names:
        assert f"{name}(" in text, name


def test_commands_and_options_are_on_the_commands_page(pages: dict[Path, Page], site: Path) -> None:
    """The options of `qwenvl serve`, which are settings, are on another page."""
    page = pages[site / "api" / "commands.html"]

    def check(command: Any, anchor: str) -> None:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                if not child.hidden:
                    check(child, f"{anchor}-{name}")
            return
        assert anchor in page.anchors
        if anchor == "qwenvl-serve":
            return
        for parameter in command.get_params(typer.Context(command)):
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in page.text, (anchor, parameter.opts)

    check(typer.main.get_command(app), "qwenvl")


@pytest.mark.parametrize(
    ("word", "page"), [("QWENVL_CACHE_DIR", "environment.html"), ("断电", "zh/batch.html")]
)
def test_search_finds(site: Path, word: str, page: str) -> None:
    """The search index has words of both languages, with separators between Chinese words."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    separator = re.compile(index["config"]["separator"])
    texts = {entry["location"]: re.sub("<[^>]+>", " ", entry["text"]) for entry in index["docs"]}
    locations = [location for location, text in texts.items() if word in separator.split(text)]
    assert any(location.startswith(page) for location in locations), locations


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
            deadline = time.monotonic() + 60
            while not (results := browser.driver.find_elements("css selector", "a.md-search-result__link")):
                assert time.monotonic() < deadline, "no result after 60 s"
                time.sleep(0.1)
            assert results[0].get_attribute("href").startswith(f"{origin}zh/batch.html")
            log = browser.driver.get_log("performance")
            messages = [json.loads(entry["message"])["message"] for entry in log]
            urls = [
                message["params"]["request"]["url"]
                for message in messages
                if message["method"] == "Network.requestWillBeSent"
            ]
            assert len(urls) > 3
            assert not [url for url in urls if not url.startswith((origin, "data:", "blob:"))]
        finally:
            browser.driver.quit()
            server.shutdown()


@pytest.mark.parametrize("chinese_path", sorted((REPO / "docs").rglob("*.zh.md")), ids=lambda path: path.name)
def test_translations_have_the_structure_of_the_english_page(chinese_path: Path) -> None:
    """The same code blocks and levels of headings; the same number of list items, table rows and images."""
    english_path = chinese_path.with_name(chinese_path.name.replace(".zh.md", ".md"))
    english, chinese = english_path.read_text("utf-8"), chinese_path.read_text("utf-8")

    def shape(text: str) -> list[object]:
        patterns = (r"^- ", r"^\|", r"^!\[")
        return [
            [level for level, _ in headings(text)],
            *(len(re.findall(pattern, text, re.MULTILINE)) for pattern in patterns),
        ]

    assert blocks(english) == blocks(chinese)
    assert shape(english) == shape(chinese)


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<h1 id='x'>A</h1>")
    (tmp_path / "b.html").write_text(
        "<a href='a.html#x'>right</a><a href='a.html#y'>no anchor</a><a href='c.html'>no file</a>"
        "<a href='#z'>no anchor</a><img src='no.png'><a href='https://example.org/'>elsewhere</a>"
    )
    pages = {path: Page(path.read_text()) for path in tmp_path.glob("*.html")}
    links = [line.split(": ")[1] for line in broken_links(pages, tmp_path)]
    assert links == ["a.html#y", "c.html", "#z", "no.png"]
