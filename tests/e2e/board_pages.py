"""The hosted dashboard as a user in a browser sees it: support for the tests of its page."""

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, Route, expect

from browser import Person
from sandbox import Client, Server

__all__ = ["WITHOUT_ITS_LIBRARY", "Board", "card", "column", "panel", "state", "without_libraries"]

expect.set_options(timeout=20_000)
WITHOUT_ITS_LIBRARY = "THREE is not defined"
"""The error of lattice's own page if the public server of its libraries is unreachable."""


class Board:
    """A server with one project, a user in a terminal, and browsers."""

    def __init__(self, server: Server, ben: Client, browser: Browser) -> None:
        self.server, self.ben, self.browser = server, ben, browser
        self.path = "/projects/board/dashboard/"

    def made(self, title: str, *options: str) -> str:
        """Create a task in the terminal and return its id."""
        said = self.ben.ok("create", title, *options, "--actor", "human:ben", "--json")
        return str(json.loads(said)["data"]["id"])

    def does(self, *argv: str) -> None:
        """Run a command in the terminal."""
        self.ben.ok(*argv, "--actor", "human:ben")

    def snapshot(self, task: str) -> dict[str, object]:
        """Return the server's snapshot of a task."""
        found: dict[str, object] = json.loads((self.server.lattice_dir() / "tasks" / f"{task}.json").read_text())
        return found

    def text(self, task: str, kind: str = "plans") -> Path:
        """Return the server's path of a plan or notes."""
        return self.server.lattice_dir() / kind / f"{task}.md"

    @cache  # noqa: B019 - as long as the server
    def _token(self, actor: str) -> str:
        return self.server.token(actor)

    @contextlib.contextmanager
    def person(self, actor: str = "human:web", *, width: int = 1280) -> Iterator[Person]:
        """A user with a signed-in browser; at the end no page has logged an error."""
        with Person(self.browser, self.server.url, viewport={"width": width, "height": 800}) as person:
            person.context.route(lambda url: "//127.0.0.1" not in url, without_libraries)
            person.enter(self._token(actor))
            yield person
            assert [said for said in person.complaints if WITHOUT_ITS_LIBRARY not in said] == []

    def open(self, person: Person, view: str = "board") -> Page:
        """Open the dashboard in a new tab; return once it is live."""
        page = person.open(f"{self.path}#/{view}")
        expect(state(page)).to_have_text("Live")
        return page


def without_libraries(route: Route) -> None:
    """Answer a page's requests to other servers, so that no test depends on them."""
    route.fulfill(body="", content_type="text/javascript")


def state(page: Page) -> Locator:
    """Return the page's connection state."""
    return page.locator("#remote-state")


def card(page: Page, task: str) -> Locator:
    return page.locator(f'.card[data-task-id="{task}"]')


def column(page: Page, status: str) -> Locator:
    return page.locator(f'.board-col[data-status="{status}"]')


def panel(page: Page) -> Locator:
    return page.locator("#detail-panel.open")
