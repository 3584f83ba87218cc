"""One browser for the tests of the page; a server, and so an origin with storage of its own, for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, needs_chromium
from serve_page_driver import WATCH, Page
from serve_page_server import PageServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(needs_chromium)


@pytest.fixture(scope="session")
def page_browser() -> Iterator[Browser]:
    # A camera that shows a test card, and that may be used without a question.
    started = Browser(
        ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--lang=en"),
        log_requests=False,
    )
    started.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
    yield started
    started.driver.quit()


@pytest.fixture
def server() -> Iterator[PageServer]:
    started = PageServer()
    yield started
    started.close()


@pytest.fixture
def page(page_browser: Browser, server: PageServer, tmp_path: Path) -> Iterator[Page]:
    """The page, not yet opened. After every test its console and its content policy have nothing to complain of."""
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    opened = Page(page_browser, server, downloads)
    yield opened
    assert opened.complaints() == []
    fetched = page_browser.js("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in fetched if not url.startswith((server.url, "data:", "blob:"))] == []
