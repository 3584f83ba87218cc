"""Driver of the chat page in Chromium."""

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
from serve_page_server import TIMEOUT, PageServer

# Script that runs before the scripts of the page and records policy violations and errors in window.violations.
RECORD_VIOLATIONS = """
window.violations = [];
addEventListener('securitypolicyviolation', e => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
addEventListener('error', e => violations.push(String(e.message)));
addEventListener('unhandledrejection', e => violations.push(String(e.reason)));
"""


class Page:
    """Driver of the page: the actions of a user, and the content that the page shows.

    Attributes:
        server: the mock server; for a real one, an object with its `url`, `key` and `ready_status`.
        js: runs JavaScript in the page, with `arguments`, and returns its value.
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
        """Open the page and wait until it shows the state of the server.

        If the server is ready and needs no API key, also wait until the page shows the model's name. A page narrower
        than 600 pixels is that of a phone, with a touch screen.
        """
        agent = self.js("return navigator.userAgent")
        self.browser.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.browser.call("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.browser.open(self.server.url, width, color_scheme)
        # These replace all features that browser.open has set, the colour scheme included.
        features = [
            {"name": "prefers-color-scheme", "value": color_scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.browser.call("Emulation.setEmulatedMedia", features=features)
        self.wait(lambda: self.js("return document.getElementById('status').dataset.state") != "unknown")
        if self.server.ready_status == 200 and self.server.key is None:
            self.wait(lambda: self.js("return document.getElementById('model').textContent"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is true and return its value."""
        end = time.monotonic() + TIMEOUT
        while not (value := condition()):
            assert time.monotonic() < end, "timeout"
            time.sleep(0.02)
        return value

    def find(self, selector: str) -> Any:
        return self.browser.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.browser.driver.find_elements("css selector", selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, text: str) -> None:
        """Type a text into the question; a newline sends it."""
        self.find("#question").send_keys(text)

    def press(self, key: str) -> None:
        """Press a key in the focused element."""
        self.browser.driver.switch_to.active_element.send_keys(key)

    def attach(self, *paths: Path) -> None:
        """Attach image files to the question."""
        count = len(self.find_all("#attached li"))
        self.find("#files").send_keys("\n".join(map(str, paths)))
        self.wait(lambda: len(self.find_all("#attached li")) == count + len(paths))

    def ask(self, text: str, *images: Path) -> None:
        """Ask a question and wait for the end of its answer."""
        if images:
            self.attach(*images)
        n_turns = len(self.find_all(".turn"))
        self.type(text + "\n")
        self.wait(lambda: len(self.find_all(".turn")) == n_turns + 1)
        self.wait_for_end()

    def wait_for_end(self) -> None:
        """Wait until the answer has ended: it is complete, stopped or failed."""
        self.wait(lambda: self.find_all(".answer") and not self.find_all(".answer.running"))

    def answers(self) -> list[str]:
        """The texts of all answers, without the numbers of boxes."""
        return self.js(
            "return [...document.querySelectorAll('.answer .words')].map(p => {"
            " const copy = p.cloneNode(true);"
            " copy.querySelectorAll('.badges').forEach(e => e.remove());"
            " return copy.textContent; })"
        )

    def note(self) -> str:
        """The note below the last answer."""
        return str(self.js("return [...document.querySelectorAll('.note')].at(-1).textContent"))

    def error(self) -> list[str]:
        """The lines of the last error: the explanation, the server's message if there is one, the button."""
        return str(self.find_all(".answer-body > .problem")[-1].text).splitlines()

    def rectangles(self, selector: str) -> list[list[float]]:
        """[left, top, right, bottom] of all matching elements, in pixels of the window."""
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right, r.bottom])",
            selector,
        )

    def downloaded(self, suffix: str) -> bytes:
        """Wait for a downloaded file and return its content."""
        return self.wait(lambda: next((f.read_bytes() for f in self.downloads.glob(f"*{suffix}")), None))

    def problems(self) -> list[str]:
        """Messages of the console, violations of the content security policy, and errors of scripts.

        Failed requests are not included: tests provoke them.
        """
        messages = [entry["message"] for entry in self.browser.driver.get_log("browser")]
        failed_request = ("Failed to load resource", "net::ERR_")
        messages = [message for message in messages if not any(text in message for text in failed_request)]
        return messages + self.js("return window.violations ?? ['the browser shows another page']")


def sent_images(body: dict[str, Any]) -> list[Image.Image]:
    """The images of the last message of a request."""
    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def image_file(folder: Path, name: str = "scene.png", size: Sequence[int] = (64, 48), seed: int = 0) -> Path:
    """Write an image of coloured blocks, the same for the same seed, and return its path."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    path = folder / name
    Image.fromarray(colours).resize(tuple(size), Image.Resampling.NEAREST).save(path)
    return path
