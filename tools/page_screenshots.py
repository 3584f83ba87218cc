"""Take the screenshots of the server's web page for docs/: `python -m tools.page_screenshots URL`.

URL is the address of a server with the demo model (`qwenvl serve --demo`). Needs Selenium, Chromium with its driver,
and a font with Chinese glyphs, such as Debian's fonts-noto-cjk.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

REPO = Path(__file__).resolve().parent.parent
IMAGES = REPO / "paddlemix_qwenvl_plugin" / "demo" / "images"
OUT = REPO / "docs" / "images"
TIMEOUT = 120  # seconds


class Browser:
    """Browser that asks questions on the page and takes screenshots."""

    def __init__(self, url: str, size: tuple[int, int], scheme: str, language: str, zoom: int) -> None:
        """Open the page.

        Args:
            url: address of the page.
            size: width and height of the window, in CSS pixels. A window narrower than 600 emulates a phone.
            scheme: preferred color scheme, light or dark.
            language: accepted language, such as zh-CN.
            zoom: device pixels per CSS pixel.
        """
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options)
        width, height = size
        is_phone = width < 600
        agent = self.driver.execute_script("return navigator.userAgent")
        self._call("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self._call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=zoom,
            mobile=is_phone,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)
        self.driver.get(url)
        self._wait("document.getElementById('model').textContent")

    def ask(self, text: str, *images: str) -> None:
        """Attach images of the demo, send a question, and wait for the end of the answer."""
        field = self.driver.find_element("id", "question")
        for name in images:
            self.driver.find_element("id", "files").send_keys(str(IMAGES / name))
        self._wait(f"document.querySelectorAll('#attached li').length === {len(images)}")
        field.send_keys(text + "\n")
        self._wait("!document.getElementById('question').value && !document.querySelector('.answer.running')")

    def run(self, code: str) -> None:
        """Run JavaScript in the page."""
        self.driver.execute_script(code)

    def save(self, path: Path) -> None:
        """Write a screenshot of the window to a PNG file, after the end of all animations."""
        self.run("document.getAnimations().forEach(a => a.finish())")
        screenshot = self._call("Page.captureScreenshot")
        with Image.open(io.BytesIO(base64.b64decode(screenshot["data"]))) as image:
            image.convert("RGB").save(path, optimize=True)

    def _wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        WebDriverWait(self.driver, TIMEOUT).until(lambda d: d.execute_script(f"return {condition}"))

    def _call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the Chrome DevTools Protocol."""
        return self.driver.execute_cdp_cmd(method, arguments)


def save_desktop(url: str) -> None:
    browser = Browser(url, (1120, 1140), "light", "en", zoom=1)
    browser.ask("Read the text.", "grounded.png")
    browser.ask("Describe the picture with boxes.")
    # Highlight the box of the second reference.
    browser.run("document.querySelectorAll('.has-boxes')[1].focus()")
    browser.save(OUT / "serve-desk.png")
    browser.driver.quit()


def save_phone(url: str) -> None:
    browser = Browser(url, (375, 812), "dark", "zh-CN", zoom=2)
    # "Describe the image and draw a box around every object."
    browser.ask("描述图片并框出每个物体。", "chinese.png")
    browser.save(OUT / "serve-phone.png")
    browser.driver.quit()


def main(arguments: Sequence[str]) -> None:
    (url,) = arguments
    save_desktop(url)
    save_phone(url)


if __name__ == "__main__":
    main(sys.argv[1:])
