"""Debian's Chromium, headless, for tests and pictures of the report's page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

HAS_BROWSER = shutil.which("chromedriver") is not None


@contextlib.contextmanager
def browser(width: int = 1200, height: int = 1600, dark: bool = False) -> Iterator[Any]:
    """A window of so many CSS pixels. Raises where a page has logged an error."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        # A window cannot be as narrow as a phone; what is emulated can.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        colours = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": colours})
        yield driver
        assert not driver.get_log("browser")
    finally:
        driver.quit()
