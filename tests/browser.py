"""A real browser for the tests: Debian's Chromium, driven by Playwright. It starts once a module; tabs are cheap.

A test asks for a ``Person``: a browser context with its own cookies and storage, and any number of tabs.
``complaints`` has the errors of the pages' consoles; in normal use it is empty.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from programs import program

__all__ = ["PATIENCE_MS", "Person", "chromium", "screenshot"]

PATIENCE_MS = 20_000
"""For how long Playwright waits for what a test expects; a machine may be busy."""
expect.set_options(timeout=PATIENCE_MS)
_ROOT = Path(__file__).resolve().parents[1]
_ARGUMENTS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser, without a window; it ends with the block. ``CHROMIUM`` may name another one's file."""
    executable = os.environ.get("CHROMIUM") or program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


class Person:
    """A user with a browser context. ``close()`` it, or use it as a context manager.

    Args:
        browser: from ``chromium()``.
        base_url: the server, so that ``open("/path")`` is enough.
        options: those of Playwright's ``new_context``, such as ``viewport`` or ``ignore_https_errors``.
    """

    def __init__(self, browser: Browser, base_url: str, **options: Any) -> None:
        self._base_url = base_url
        self.context = browser.new_context(base_url=base_url, **options)
        self.context.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        """What the pages' consoles said of errors and warnings, and every script that failed."""
        self.context.on("console", self._said)
        self.context.on("weberror", lambda failed: self.complaints.append(str(failed.error)))

    def open(self, path: str) -> Page:
        """Open a path of the server in a new tab."""
        page = self.context.new_page()
        page.goto(path)
        return page

    def sign_in(self, token: str, path: str = "/") -> Page:
        """Open a path in a new tab, and sign in on the way."""
        page = self.open(path)
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(lambda url: "/sign-in" not in url)
        return page

    def enter(self, token: str) -> None:
        """Sign in without a page, by the page's request."""
        headers = {"Origin": self._base_url}
        answer = self.context.request.post("/sign-in", form={"token": token}, headers=headers, max_redirects=0)
        assert answer.status == 303

    def close(self) -> None:
        """Close all tabs, and clear cookies and storage."""
        self.context.close()

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def screenshot(page: Page, name: str, *, whole: bool = True) -> Path:
    """Store a screenshot for a person to look at, of the whole page or its visible part.

    Its directory is ``build/screenshots/``, or ``SCREENSHOTS``.
    """
    directory = Path(os.environ.get("SCREENSHOTS", _ROOT / "build/screenshots"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    page.screenshot(path=path, full_page=whole)
    return path
