"""A real browser for the report's tests, with a record of all a page does that it should not."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

REGIONS = 120
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Any]:
    """An installed Chromium, driven by playwright; skips the test that asks where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium found: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


class Visit:
    """One page opened from disk, or by its address. ``complaints`` must be empty: console messages, errors, dialogs,
    requests elsewhere.
    """

    def __init__(
        self, browser: Any, path: Path | str, address: str = "", size: dict[str, int] = WIDE, **options: Any
    ) -> None:
        self.context = browser.new_context(viewport=size, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"console {message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("popup", lambda popup: self.complaints.append(f"popup: {popup.url}"))
        self.page.set_default_timeout(30_000)  # milliseconds; a machine may be busy
        self.url = path if isinstance(path, str) else path.as_uri()
        self.page.goto(self.url + address)

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def text(self, selector: str) -> str:
        """Text of the first element a selector finds, as the page shows it."""
        return self.page.locator(selector).first.inner_text()

    def texts(self, selector: str) -> list[str]:
        """Text content of every element a selector finds."""
        return self.page.locator(selector).all_text_contents()

    def rows(self) -> list[int]:
        """The regions that the table shows now."""
        return [int(text) for text in self.texts("#region-rows th a")]

    def all_rows(self) -> list[int]:
        """All rows of the table from the present page on."""
        found = self.rows()
        while self.page.get_attribute("#page-on", "aria-disabled") == "false":
            self.page.click("#page-on")
            found += self.rows()
        return found

    def go_to(self, latent: object, noun: str = "region") -> None:
        """Name a region or a feature in the address and wait for its details."""
        self.page.evaluate(f"location.hash = '{noun}-{latent}'")
        self.wait_for(latent, noun)

    def until(self, expression: str, arg: object = None, seconds: float = 30.0) -> None:
        """Wait until an expression, or a function of ``arg``, is true in the page.

        Playwright's own wait evaluates a string within the page if it is not true at once, which the page's content
        security policy forbids.
        """
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression, arg):
            assert time.monotonic() < end, f"not so within {seconds} s: {expression}"
            self.page.wait_for_timeout(20)

    def wait_for(self, latent: object, noun: str = "region") -> None:
        """Wait for the details of a region or a feature: a browser announces a change of the address a moment later."""
        title = {"region": "detail-title", "feature": "feature-detail-title"}[noun]
        start = f"{noun.capitalize()} {latent} "
        self.until("([title, start]) => document.getElementById(title).textContent.startsWith(start)", [title, start])

    def resize(self, width: int) -> None:
        """Give the window another width and wait until the page fits: plots are drawn anew a moment later."""
        self.page.set_viewport_size({"width": width, "height": 600})
        self.until("(width) => innerWidth === width && document.documentElement.scrollWidth <= width", width)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
