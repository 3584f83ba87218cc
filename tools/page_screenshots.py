"""Take the docs' screenshots of the server's page: `python -m tools.page_screenshots URL`.

URL: address of a server with the demo model (`qwenvl serve --demo`). Needs Selenium, Chromium with its driver, and a
font with Chinese glyphs, such as Debian's fonts-noto-cjk.
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
SECONDS = 120


class Shooter:
    """Browser that asks questions on the page and takes screenshots."""

    def __init__(self, url: str, size: tuple[int, int], scheme: str, language: str, zoom: int) -> None:
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        self.driver = webdriver.Chrome(options=options)
        width, height = size
        phone = width < 600
        agent = self.driver.execute_script("return navigator.userAgent")
        self._call("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self._call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=zoom,
            mobile=phone,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", features=features)
        self.driver.get(url)
        self._wait("document.getElementById('model').textContent")

    def ask(self, text: str, *images: str) -> None:
        field = self.driver.find_element("id", "question")
        for name in images:
            self.driver.find_element("id", "files").send_keys(str(IMAGES / name))
        self._wait(f"document.querySelectorAll('#attached li').length === {len(images)}")
        field.send_keys(text + "\n")
        self._wait("!document.getElementById('question').value && !document.querySelector('.answer.running')")

    def do(self, code: str) -> None:
        self.driver.execute_script(code)

    def save(self, path: Path) -> None:
        """Write the window as a PNG file."""
        self.do("document.getAnimations().forEach(a => a.finish())")
        shot = self._call("Page.captureScreenshot")
        with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as image:
            image.convert("RGB").save(path, optimize=True)

    def _wait(self, condition: str) -> None:
        WebDriverWait(self.driver, SECONDS).until(lambda d: d.execute_script(f"return {condition}"))

    def _call(self, method: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(method, arguments)


def desk(url: str) -> None:
    shooter = Shooter(url, (1120, 1140), "light", "en", 1)
    shooter.ask("Read the text.", "grounded.png")
    shooter.ask("Describe the picture with boxes.")
    shooter.do("document.querySelectorAll('.linked')[1].focus()")
    shooter.save(OUT / "serve-desk.png")
    shooter.driver.quit()


def phone(url: str) -> None:
    shooter = Shooter(url, (375, 812), "dark", "zh-CN", 2)
    shooter.ask("描述图片并框出每个物体。", "chinese.png")
    shooter.save(OUT / "serve-phone.png")
    shooter.driver.quit()


def main(arguments: Sequence[str]) -> None:
    (url,) = arguments
    desk(url)
    phone(url)


if __name__ == "__main__":
    main(sys.argv[1:])
