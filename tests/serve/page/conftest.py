"""Fixtures for tests of the chat page: one browser for all tests; each test has its own server.

Each server has another port, therefore another origin, so that no test sees the browser storage of another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, needs_chromium
from serve_page_driver import RECORD_VIOLATIONS, Page
from serve_page_server import PageServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # of the whole test run, not only of this folder
        if Path(__file__).parent in item.path.parents:
            item.add_marker(needs_chromium)


@pytest.fixture(scope="session")
def page_browser() -> Iterator[Browser]:
    # A fake camera that shows a test image; pages may use it without the user's permission.
    browser = Browser(
        ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--lang=en"),
        log_requests=False,
    )
    browser.call("Page.addScriptToEvaluateOnNewDocument", source=RECORD_VIOLATIONS)
    yield browser
    browser.driver.quit()


@pytest.fixture
def server() -> Iterator[PageServer]:
    server = PageServer()
    yield server
    server.close()


@pytest.fixture
def page(page_browser: Browser, server: PageServer, tmp_path: Path) -> Iterator[Page]:
    """The page, not yet opened.

    Each test fails if the page has logged an error, violated its content security policy, or used another server.
    """
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    page = Page(page_browser, server, downloads)
    yield page
    assert page.problems() == []
    fetched = page_browser.js("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [url for url in fetched if not url.startswith((server.url, "data:", "blob:"))] == []
