"""Headless Chromium, driven by Selenium, for the tests of pages."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
DRIVER = shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no Chromium with its driver: apt-get install chromium chromium-driver",
)


class Browser:
    """Chromium with a log of its console and, with `log_requests`, of its requests."""

    def __init__(self, arguments: Sequence[str] = (), log_requests: bool = True) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install -e '.[dev]'")
        from selenium.webdriver.chrome.service import Service

        self.logs = ["performance", "browser"] if log_requests else ["browser"]
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--disable-dev-shm-usage", *arguments):
            options.add_argument(argument)
        if os.getuid() == 0:
            options.add_argument("--no-sandbox")
        options.set_capability("goog:loggingPrefs", dict.fromkeys(self.logs, "ALL"))
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, url: str, width: int = 1280, color_scheme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": color_scheme}]
        )
        # Discard the entries of earlier pages: reading a log empties it.
        for log in self.logs:
            self.driver.get_log(log)
        self.driver.get(url)

    def call(self, method: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(method, arguments)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self) -> Any:
        """The page in its full height, int16 [H, W, 3]: signed, so that screenshots can be subtracted."""
        width, height = self.js("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        capture = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
        )
        with Image.open(io.BytesIO(base64.b64decode(capture["data"]))) as image:
            return np.asarray(image.convert("RGB"), np.int16)
