"""The page in Chromium, before a server of a test."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from chromium import Browser
from PIL import Image
from serve_page_server import PATIENCE, PageServer

# What a page must not do: it is noted in the page itself, before its scripts run.
WATCH = """
window.violations = [];
addEventListener('securitypolicyviolation', e => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
addEventListener('error', e => violations.push(String(e.message)));
addEventListener('unhandledrejection', e => violations.push(String(e.reason)));
"""


class Page:
    """Driver of the page: a user's actions, and the content that the page shows.

    Attributes:
        downloads: the browser's download folder.
    """

    def __init__(self, browser: Browser, server: PageServer, downloads: Path) -> None:
        self.browser = browser
        self.server = server
        self.downloads = downloads
        self.js = browser.js

    def open(
        self,
        width: int = 1280,
        color_scheme: str = "light",
        language: str = "en",
        reduced_motion: bool = False,
    ) -> None:
        """Open the page, and wait until it knows its server."""
        agent = self.js("return navigator.userAgent")
        self.browser.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.browser.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.browser.open(self.server.url, width, color_scheme)
        features = [
            {"name": "prefers-color-scheme", "value": color_scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.browser.call("Emulation.setEmulatedMedia", features=features)
        self.wait(lambda: self.js("return document.getElementById('status').dataset.state") != "unknown")
        if self.server.ready == 200 and self.server.key is None:
            self.wait(lambda: self.js("return document.getElementById('model').textContent"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until the condition is true; its value."""
        end = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.02)
        return value

    def find(self, selector: str) -> Any:
        return self.browser.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.driver.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, text: str) -> None:
        self.find("#question").send_keys(text)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        self.browser.driver.switch_to.active_element.send_keys(key)

    def attach(self, *paths: Path) -> None:
        count = len(self.all("#attached li"))
        self.find("#files").send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.all("#attached li")) == count + len(paths))

    def ask(self, text: str, *images: Path) -> None:
        """Ask a question, and wait for the end of its answer."""
        if images:
            self.attach(*images)
        n_turns = len(self.all(".turn"))
        self.type(text + "\n")
        self.wait(lambda: len(self.all(".turn")) == n_turns + 1)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        self.wait(lambda: self.all(".answer") and not self.all(".answer.running"))

    def answers(self) -> list[str]:
        """The words of the answers, without the numbers of boxes."""
        return self.js(
            "return [...document.querySelectorAll('.answer .words')].map(p => {"
            " const copy = p.cloneNode(true);"
            " copy.querySelectorAll('.badges').forEach(e => e.remove());"
            " return copy.textContent; })"
        )

    def note(self) -> str:
        return str(self.js("return [...document.querySelectorAll('.note')].at(-1).textContent"))

    def problem(self) -> list[str]:
        """The lines of the last error: what happened, what the server says, the button."""
        return str(self.all(".said > .problem")[-1].text).splitlines()

    def rectangles(self, selector: str) -> list[list[float]]:
        """Left, top, right and bottom of elements, in pixels of the window."""
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right, r.bottom])",
            selector,
        )

    def downloaded(self, suffix: str) -> bytes:
        """The file that was saved."""
        return self.wait(lambda: next((f.read_bytes() for f in self.downloads.glob(f"*{suffix}")), None))

    def complaints(self) -> list[str]:
        """Messages of the console and violations of the content policy, without error statuses that a test expects."""
        said = [entry["message"] for entry in self.browser.driver.get_log("browser")]
        said = [line for line in said if "Failed to load resource" not in line and "net::ERR_" not in line]
        return said + self.js("return window.violations ?? ['the page was left']")


def sent_images(body: dict[str, Any]) -> list[Image.Image]:
    """The images of the last message of a request."""
    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def image_file(folder: Path, name: str = "scene.png", size: Sequence[int] = (64, 48), seed: int = 0) -> Path:
    """An image of coloured blocks, the same for the same seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    path = folder / name
    Image.fromarray(colours).resize(tuple(size), Image.Resampling.NEAREST).save(path)
    return path
