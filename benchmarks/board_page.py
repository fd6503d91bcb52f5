"""The board of a large project in a real browser: first view, one change, and views side by side, hosted and local."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route

from browser import Person
from sandbox import Server, wait_for

__all__ = ["Change", "FirstView", "OpenBoard", "local_dashboard", "median", "server_processes"]

_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE_MS = 120_000
_RECORD = """
window.__blocked = 0;
new PerformanceObserver(function (list) {
  list.getEntries().forEach(function (task) { window.__blocked = Math.max(window.__blocked, task.duration); });
}).observe({ type: "longtask", buffered: true });
(function look() {
  if (document.querySelector("#app .card")) {
    requestAnimationFrame(function () { window.setTimeout(function () { window.__shown = performance.now(); }, 0); });
  } else requestAnimationFrame(look);
})();
"""
"""Runs before the page's scripts: the longest task of the main thread, and when the first card was painted."""
_FIRST = """new Promise(function look(done) {
  if (window.__shown) done();
  else window.setTimeout(look, 50, done);
})"""
_SHOWN = """title => new Promise(function look(done) {
  var found = Array.prototype.some.call(document.querySelectorAll(".card-title"), function (each) {
    return each.textContent === title;
  });
  if (found) done(performance.now());
  else window.setTimeout(look, 50, done);
})"""
_ALONE = """async quick => {
  var began = performance.now();
  await (await fetch(quick)).text();
  return performance.now() - began;
}"""
_SIDE_BY_SIDE = """async ([slow, quick]) => {
  var other = fetch(slow).then(function (answer) { return answer.text(); });
  await new Promise(function (done) { window.setTimeout(done, 50); });
  var began = performance.now();
  await (await fetch(quick)).text();
  var took = performance.now() - began;
  await other;
  return took;
}"""


@dataclass(frozen=True)
class Processes:
    """A process and its children."""

    pid: int

    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        pids, found = [self.pid], []
        while pids:
            found.append(pids.pop())
            with contextlib.suppress(OSError):
                pids += map(int, Path(f"/proc/{found[-1]}/task/{found[-1]}/children").read_text().split())
        return found


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process and its ended children, in seconds."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS
    return 0.0


@dataclass(frozen=True)
class FirstView:
    """A page that was loaded by a browser with an empty cache."""

    seconds: float
    blocked_s: float
    """The longest time for which the page did not react."""
    wire_bytes: int


@dataclass(frozen=True)
class Change:
    """One change, with one page open."""

    server_s: float
    """Processor time of the server and its processes."""
    wire_bytes: int
    shown_s: float
    blocked_s: float


@dataclass
class _Wire:
    """Bytes that a page has received, as sent: headers and compressed bodies."""

    received: int = 0
    sessions: list[Any] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.dataReceived", self._data)
        self.sessions.append(session)

    def _data(self, event: dict[str, Any]) -> None:
        self.received += event["encodedDataLength"]


def median(values: list[float]) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def _page(person: Person) -> Iterator[tuple[Page, _Wire]]:
    page = person.context.new_page()
    page.set_default_timeout(_PATIENCE_MS)
    page.add_init_script(_RECORD)
    wire = _Wire()
    wire.listen(page)
    try:
        yield page, wire
    finally:
        page.close()


def without_libraries(route: Route) -> None:
    """Answer requests to other servers, which differ in speed from run to run."""
    route.fulfill(body="", content_type="text/javascript")


@contextlib.contextmanager
def visitor(browser: Browser, url: str, token: str = "") -> Iterator[Person]:
    """A browser with an empty cache, signed in if there is a token."""
    with Person(browser, url, viewport={"width": 1280, "height": 800}) as person:
        person.context.set_default_timeout(_PATIENCE_MS)
        person.context.route(lambda address: "//127.0.0.1" not in address, without_libraries)
        if token:
            person.enter(token)
        yield person


@dataclass(frozen=True)
class OpenBoard:
    """A board at an address, and the processes that serve it."""

    browser: Browser
    url: str
    path: str
    server: Processes
    token: str = ""

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Page, _Wire]]:
        """Open the page in a browser with an empty cache; return once the first card is painted."""
        with visitor(self.browser, self.url, self.token) as person, _page(person) as (page, wire):
            page.goto(self.path)
            page.evaluate(_FIRST)
            yield page, wire

    def first_view(self) -> FirstView:
        with self._open() as (page, wire):
            return FirstView(page.evaluate("window.__shown") / 1000, _blocked_s(page), wire.received)

    def changes(self, make: Callable[[str], object], count: int) -> list[Change]:
        """Return figures of changes of a title by another program, after one that is not measured."""
        with self._open() as (page, wire):
            return [self._change(page, wire, make, number) for number in range(count + 1)][1:]

    def _change(self, page: Page, wire: _Wire, make: Callable[[str], object], number: int) -> Change:
        _settle(self.server)
        title = f"Changed in a browser {number} {time.time_ns()}"
        page.evaluate("window.__blocked = 0")
        cpu_s, received = self.server.cpu_s(), wire.received
        make(title)
        began = page.evaluate("performance.now()")
        shown = page.evaluate(_SHOWN, title)
        blocked_s = _blocked_s(page)
        _settle(self.server)
        return Change(self.server.cpu_s() - cpu_s, wire.received - received, max(0, shown - began) / 1000, blocked_s)

    def side_by_side_s(self, slow: str, quick: str) -> tuple[float, float]:
        """Return how long a view's request takes, alone and while that of another view runs."""
        with self._open() as (page, _):
            return page.evaluate(_ALONE, quick) / 1000, page.evaluate(_SIDE_BY_SIDE, [slow, quick]) / 1000


def _blocked_s(page: Page) -> float:
    """Return the longest task, once the page is idle: the entries arrive after the tasks."""
    page.evaluate("new Promise(function (done) { requestIdleCallback(done, { timeout: 20000 }); })")
    page.wait_for_timeout(200)
    return float(page.evaluate("window.__blocked")) / 1000


def _settle(server: Processes) -> None:
    """Wait until the server has been idle for half a second."""
    seen = [server.cpu_s()]

    def is_idle() -> bool:
        time.sleep(0.1)
        seen.append(server.cpu_s())
        return len(seen) > 5 and seen[-1] - seen[-5] < 0.02

    wait_for(is_idle, "the server to be idle", 60)


@contextlib.contextmanager
def local_dashboard(lattice: Path, directory: Path, env: dict[str, str], port: int) -> Iterator[Processes]:
    """Run plain ``lattice dashboard`` in a directory."""
    process = subprocess.Popen(
        [lattice, "dashboard", "--port", str(port)],
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Processes(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def server_processes(server: Server) -> Processes:
    assert server.process is not None
    return Processes(int(server.process.pid))
