"""A real Chromium without a window, from the system's packages, driven by Playwright: it brings none of its own.

FLOWKIT_REQUIRE_BROWSER=1   fail where there is none, instead of skipping
FLOWKIT_TEST_BROWSER        the path of another Chromium or Chrome
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    named = os.environ.get("FLOWKIT_TEST_BROWSER")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


@contextlib.contextmanager
def opened_browser() -> Iterator[Any]:
    """The browser; skips the test where there is none, unless one is demanded."""
    path = find_browser()
    if path is None:
        reason = f"no browser: none of {', '.join(NAMES)} was found on PATH (Debian: apt-get install chromium)"
        if os.environ.get("FLOWKIT_REQUIRE_BROWSER") == "1":
            pytest.fail(f"FLOWKIT_REQUIRE_BROWSER is set, but there is {reason}")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's own sandbox cannot be made by root, as whom CI runs
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page, with what went wrong on it: errors of the console, and requests to any other host than its own.

    ``expected`` is a text of the console that is no error here, such as ``401``.
    """

    def __init__(
        self,
        browser: Any,
        address: str,
        password: str | None,
        user: str = "flowkit",
        *,
        expected: str = "\n",
        **options: Any,
    ) -> None:
        if password is not None:
            options["http_credentials"] = {"username": user, "password": password, "origin": address.rstrip("/")}
        self.address = address
        self.expected = expected
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: request.url.startswith(address) or self.elsewhere.append(request.url))

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.context.close()
        if kind is None:
            errors = [error for error in self.errors if self.expected not in error]
            assert errors == [], f"the console has {errors}"
            assert self.elsewhere == [], f"other hosts were asked: {self.elsewhere}"
