"""One server with many clients, slow ones, many writers, many tasks, and after a restart, within stated bounds.

``make load`` runs all groups in some ten minutes and ends by itself; name groups to run some: ``python
benchmarks/load.py stalled restart``. Exits 1 when a bound is broken. Compared figures are of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / part) for part in ("tests", "tests/e2e", "examples")]

from board_page import (  # noqa: E402
    Change,
    FirstView,
    OpenBoard,
    local_dashboard,
    median,
    server_processes,
)
from dashboards import free_port  # noqa: E402
from fanout import Rate, commit_to_file, fan_out  # noqa: E402
from projects import ManyProjects  # noqa: E402

from browser import chromium  # noqa: E402
from load_scenarios import (  # noqa: E402
    BY,
    a_busy_log,
    agent_mib,
    fill,
    greed,
    grow_log,
    server_mib,
    stalled_clients,
    storm,
    writers_at_once,
)
from memory_client import MemoryClient  # noqa: E402
from request_client import Light  # noqa: E402
from sandbox import BIN, Client, Sandbox, Server, differences, wait_for  # noqa: E402


@dataclass(frozen=True)
class Figure:
    """One line: name, value, and for some the bound and whether it was kept."""

    name: str
    value: float
    unit: str
    bound: str = ""
    kept: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.kept is None else ("kept" if self.kept else "BROKEN")
        return f"  {self.name:<70} {self.value:>9.2f} {self.unit:<6} {self.bound:<10} {verdict}"


def at_most(name: str, value: float, unit: str, bound: float) -> Figure:
    return Figure(name, value, unit, f"<= {bound:g}", value <= bound)


def at_least(name: str, value: float, unit: str, bound: float) -> Figure:
    return Figure(name, value, unit, f">= {bound:g}", value >= bound)


def timed(run: Callable[[], object]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


def stalled(options: argparse.Namespace) -> Iterator[Figure]:
    with Sandbox() as sandbox:
        done = stalled_clients(sandbox, clients=options.clients, stalled=options.stalled, seconds=options.seconds)
    yield Figure("clients that follow one project", done.clients, "")
    yield Figure("of these, real agents that stop reading", options.stalled, "")
    yield Figure("writes a second before", done.before.per_second, "/s")
    yield Figure("writes a second beside the stalled", done.during.per_second, "/s")
    yield at_least("the same, as a ratio", done.during.per_second / done.before.per_second, "x", 0.8)
    yield Figure("a write before, p99", done.before.p99_ms, "ms")
    yield Figure("a write beside the stalled, p99", done.during.p99_ms, "ms")
    yield at_most("memory of server and worker, each client", done.mib_per_client, "MiB", 0.1)
    yield at_most("growth of server and worker beside the stalled", done.mib_growth, "MiB", 20.0 * options.stalled)
    yield at_most("the last stalled client was cut after", done.cut_after_s, "s", 25)
    yield at_most("it equals the server again, after it goes on, in", done.caught_up_s, "s", 30)


def writers(options: argparse.Namespace) -> Iterator[Figure]:
    with Sandbox() as sandbox:
        done = writers_at_once(sandbox, clients=options.writers, seconds=options.minute)
    yield Figure("clients that write at once", options.writers, "")
    yield Figure("writes a second, all together, without an error", done.pace.per_second, "/s")
    yield Figure("a write, p50", done.pace.p50_ms, "ms")
    yield Figure("a write, p99", done.pace.p99_ms, "ms")
    yield at_least("the slowest client's share of the mean", done.slowest_share, "x", 0.8)
    with Sandbox() as sandbox:
        alone, beside = greed(sandbox, in_flight=200, seconds=options.seconds / 2)
    yield Figure("a write of a client that is alone, p50", alone.p50_ms, "ms")
    yield Figure("beside one with 200 requests under way, p50", beside.p50_ms, "ms")
    yield at_most("the same, as a ratio (in the order of arrival it was 73)", beside.p50_ms / alone.p50_ms, "x", 40)


def restart(options: argparse.Namespace) -> Iterator[Figure]:
    for name, kill in (("restarted", False), ("killed and started", True)):
        with Sandbox() as sandbox:
            done = storm(sandbox, clients=options.clients, kill=kill)
        yield Figure(f"clients of a server that is {name}", options.clients, "")
        yield Figure("current again, from when it listens: the first", done.first_s, "s")
        yield Figure("half of them", done.median_s, "s")
        yield at_most("the last", done.last_s, "s", 20)
        yield at_most("attempts that failed, each client", done.failed_attempts, "", 10)


def tasks(options: argparse.Namespace) -> Iterator[Figure]:
    with Sandbox() as sandbox:
        server, token = _stopped_large_project(sandbox, options.tasks)
        yield Figure("tasks, each with log, snapshot and plan", options.tasks, "")
        yield from _large_project(sandbox, server, token)
        yield from _busy_log(server, token)


def _stopped_large_project(sandbox: Sandbox, count: int) -> tuple[Server, str]:
    server = sandbox.started_server()
    token = server.token("human:ana", "agent:*")
    asyncio.run(_first_task(server, token))
    server.stop()
    fill(server.lattice_dir(), count)
    return server, token


def _large_project(sandbox: Sandbox, server: Server, token: str) -> Iterator[Figure]:
    server.start()
    opened_s = timed(lambda: asyncio.run(_open(server, token)))
    yield at_most("first start on files that it has not seen", opened_s, "s", 3)
    ana = sandbox.client("ana")
    pushed_s, cloned_s = _git(server.lattice_dir(), sandbox.root / "git")
    yield Figure("git add, commit and push of the same files", pushed_s, "s")
    yield Figure("git clone of the same files", cloned_s, "s")
    filled_s = timed(lambda: ana.add_remote(server, token))
    yield Figure("first fill of a cache", filled_s, "s")
    yield at_most("first fill / git clone", filled_s / cloned_s, "x", 1.3)
    assert not differences(ana.lattice_dir, server.lattice_dir())
    yield at_most("memory of server and worker", server_mib(server), "MiB", 200)
    yield at_most("memory of the agent", agent_mib(ana), "MiB", 150)
    ana.ok("list", "--quiet")
    listed_s = timed(lambda: ana.ok("list", "--quiet"))
    yield Figure("lattice list", listed_s, "s")
    yield at_most("lattice remote status", timed(lambda: ana.ok("remote", "status")), "s", 0.3)
    yield at_most("lattice comment", timed(lambda: ana.ok("comment", "LAT-77", "one more", *BY)), "s", 3)
    yield at_most("lattice create", timed(lambda: ana.ok("create", "One more", *BY)), "s", 3)
    ana.ok("remote", "agent", "stop")
    first_s = timed(lambda: ana.ok("list", "--quiet"))
    yield at_most("what a new agent adds to its first command", first_s - listed_s, "s", 0.6)
    yield at_most("lattice remote pull", timed(lambda: ana.ok("remote", "pull")), "s", 0.6)
    yield at_most("everything compared: lattice remote verify", timed(lambda: ana.ok("remote", "verify")), "s", 2)
    (ana.lattice_dir / "cache_state.json").unlink()
    ana.ok("remote", "agent", "stop")
    yield at_most("resync of a cache without its state", timed(lambda: ana.ok("remote", "sync")), "s", 3)
    server.stop()
    server.start()
    yield at_most("start on files that it knows", timed(lambda: asyncio.run(_open(server, token))), "s", 0.5)
    _wait_until_equal(ana, server)
    yield from _whole_projects(sandbox, server, pushed_s)


def _whole_projects(sandbox: Sandbox, server: Server, git_s: float) -> Iterator[Figure]:
    """Import the project again, and push it from a directory."""
    owner = sandbox.client("owner")
    shutil.copytree(server.lattice_dir(), owner.lattice_dir)
    imported_s = timed(lambda: server.admin("import", "--from", str(owner.dir), "--project", "imported"))
    yield Figure("lattice-remote import", imported_s, "s")
    yield at_most("lattice-remote import / git add, commit and push", imported_s / git_s, "x", 1.5)
    server.project("pushed")
    owner.add_remote(server, server.token("human:ana", slug="pushed"), "pushed")
    pushed_s = timed(lambda: owner.ok("remote", "push"))
    yield Figure("lattice remote push", pushed_s, "s")
    yield at_most("lattice remote push / git add, commit and push", pushed_s / git_s, "x", 1.5)
    for slug in ("imported", "pushed"):
        assert not differences(server.lattice_dir(slug), server.lattice_dir()), slug


def _git(lattice: Path, place: Path) -> tuple[float, float]:
    """Return the seconds that git takes to add, commit and push, then to clone, a copy of these files.

    Nothing is removed before the end: ext4 creates files slowly for minutes after the removal of many.
    """
    source = place / "source"
    shutil.copytree(lattice, source)
    subprocess.run(["git", "init", "-q", "--bare", place / "bare"], check=True)

    def git(*argv: str) -> None:
        subprocess.run(["git", "-C", source, *argv], check=True, capture_output=True)

    git("init", "-q")
    author = ("-c", "user.name=Ana", "-c", "user.email=ana@example.org")
    to_bare = ("push", "-q", (place / "bare").as_uri(), "HEAD:main")
    pushed_s = timed(lambda: [git("add", "-A"), git(*author, "commit", "-qm", "all"), git(*to_bare)])
    cloned_s = timed(lambda: git("clone", "-q", source.as_uri(), str(place / "clone")))
    return pushed_s, cloned_s


def _busy_log(server: Server, token: str) -> Iterator[Figure]:
    """Fill another cache while four clients write into one large log."""
    megabytes = 20
    server.stop()
    grow_log(server.lattice_dir(), megabytes)
    server.start()

    async def run() -> tuple[float, float, int]:
        copy = MemoryClient(server.url, token)
        async with a_busy_log(server, token) as pace:
            while len(pace) < 20:  # noqa: ASYNC110 - they write
                await asyncio.sleep(0.01)
            began, before = time.monotonic(), len(pace)
            copy.start()
            await copy.current(timeout_s=120)
            took = time.monotonic() - began
            rate = (len(pace) - before) / took
        await copy.close()
        return took, rate, copy.received_bytes("events/")

    took, rate, received = asyncio.run(run())
    yield Figure("writes a second into one log of 20 MiB, meanwhile", rate, "/s")
    yield at_most("first fill while that log grows", took, "s", 60)
    yield at_most("of logs was sent", received / 1024 / 1024, "MiB", 2.5 * megabytes)


def page(options: argparse.Namespace) -> Iterator[Figure]:
    """Show the large project in a browser, from the server and by plain ``lattice dashboard``, in turns."""
    with Sandbox() as sandbox:
        server, token = _stopped_large_project(sandbox, options.tasks)
        plain = sandbox.client("plain")
        shutil.copytree(server.lattice_dir(), plain.lattice_dir)
        server.start()
        asyncio.run(_open(server, token))
        port = free_port()
        with local_dashboard(BIN / "lattice", plain.dir, plain.env, port) as local, chromium() as browser:
            wait_for(lambda: _answers(port), "the local dashboard to listen")
            hosted_board = OpenBoard(browser, server.url, "/projects/board/dashboard/", server_processes(server), token)
            local_board = OpenBoard(browser, f"http://127.0.0.1:{port}", "/", local)
            yield Figure("tasks on the board", options.tasks, "")
            yield Figure("first view of a server that has just started", hosted_board.first_view().seconds, "s")
            pairs = [(hosted_board.first_view(), local_board.first_view()) for _ in range(options.views)]
            yield from _first_views([hosted for hosted, _ in pairs], [plain for _, plain in pairs])
            yield from _changes(
                hosted_board.changes(lambda title: _rename(server, token, title), options.views),
                local_board.changes(lambda title: plain.ok("update", "LAT-77", f"title={title}", *BY), options.views),
            )
            alone_s, beside_s = hosted_board.side_by_side_s("/api/activity?search=x", "/api/tasks")
            yield Figure("the list of tasks, alone", alone_s, "s")
            yield at_most("the same while the activity of all tasks is searched", beside_s, "s", 2 * alone_s + 0.5)


def _first_views(hosted: list[FirstView], local: list[FirstView]) -> Iterator[Figure]:
    local_s = median([view.seconds for view in local])
    yield Figure("first view, local lattice dashboard", local_s, "s")
    yield at_most("first view, hosted", median([view.seconds for view in hosted]), "s", round(local_s, 2))
    yield Figure("the local page is blocked for", median([view.blocked_s for view in local]), "s")
    yield at_most("the hosted page is blocked for", median([view.blocked_s for view in hosted]), "s", 1)
    yield Figure("received by the local page", median([view.wire_bytes / 1024 for view in local]), "KiB")
    yield Figure("received by the hosted page", median([view.wire_bytes / 1024 for view in hosted]), "KiB")


def _changes(hosted: list[Change], local: list[Change]) -> Iterator[Figure]:
    yield Figure("one change: processor time of the local dashboard", median([each.server_s for each in local]), "s")
    yield at_most("one change: processor time of the server", median([each.server_s for each in hosted]), "s", 0.25)
    yield Figure("received by the local page", median([each.wire_bytes / 1024 for each in local]), "KiB")
    yield at_most("received by the hosted page", median([each.wire_bytes / 1024 for each in hosted]), "KiB", 300)
    yield Figure("shown by the local page after", median([each.shown_s for each in local]), "s")
    yield Figure("shown by the hosted page after", median([each.shown_s for each in hosted]), "s")
    yield Figure("the local page is blocked for", median([each.blocked_s for each in local]), "s")
    yield at_most("the hosted page is blocked for", max(each.blocked_s for each in hosted), "s", 1)


def _rename(server: Server, token: str, title: str) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request("PATCH", "/projects/board/tasks/LAT-77", json.dumps({"title": title}), headers)
        assert connection.getresponse().status == 200


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


async def _first_task(server: Server, token: str) -> None:
    async with Light(server.url, token) as client:
        await client.ok("create", "One", *BY)


async def _open(server: Server, token: str) -> None:
    async with Light(server.url, token) as client:
        assert client.welcome.epoch


def _wait_until_equal(client: Client, server: Server) -> None:
    wait_for(lambda: not differences(client.lattice_dir, server.lattice_dir()), "the cache to equal the server", 60)


def fanout(options: argparse.Namespace) -> Iterator[Figure]:
    """Changes to many clients beside ``websockets.broadcast`` and a Starlette stream, and from a commit to a file."""

    def figures(name: str, rounds: list[Rate]) -> Iterator[Figure]:
        yield Figure(name, median([each.per_second for each in rounds]), "/s")
        yield Figure("processor time of the server for each", median([each.processor_us for each in rounds]), "us")

    kinds = {"websocket": "websockets.broadcast", "sse": "Starlette's streaming response"}
    for kind, plain in kinds.items():
        clients, stalled, changes = options.listeners, options.stalled, options.changes
        with Sandbox() as sandbox:
            done = fan_out(sandbox, kind, clients=clients, stalled=stalled, changes=changes, rounds=options.rounds)
        yield Figure(f"clients by {kind}", clients, "")
        yield from figures(f"messages a second, {plain}", done.plain)
        yield from figures("the same bytes as changes", done.ours)
        yield at_least("the same, as a ratio", done.ratio(done.ours), "x", 0.8)
        yield from figures(f"the same, {stalled} of the clients stalled", done.beside_stalled)
        yield at_least("the same, as a ratio", done.ratio(done.beside_stalled), "x", 0.75)
        yield at_most("growth of server and worker beside the stalled", done.growth_mib, "MiB", 20.0 * stalled)
    delay = commit_to_file(clients=options.writers, seconds=options.seconds)
    yield Figure("clients that write once a second, and as many that follow", options.writers, "")
    yield at_most("from a commit to the file in a cache, p50", delay.p50, "ms", 5)
    yield at_most("the same, p99", delay.p99, "ms", 50)


def projects(options: argparse.Namespace) -> Iterator[Figure]:
    few, count, wake = options.projects, 2 * options.projects, 10
    with Sandbox() as sandbox:
        many = ManyProjects(sandbox, few + count)
        used, cold = many.slugs[:few], many.slugs[few:]
        asyncio.run(_use_each(many, used))
        yield Figure("projects after one write and one read each", few, "")
        yield Figure("processes", many.processes, "")
        yield at_most("their memory", many.mib, "MiB", 350)
        many.wait_until_idle()
        yield Figure("processes after the idle time", many.processes, "")
        yield at_most("their memory", many.mib, "MiB", 120)
        processes = server_processes(many.server)
        began_s = processes.cpu_s()
        back = asyncio.run(many.returns(used[:wake]))
        used_s = processes.cpu_s() - began_s
        yield at_most("added to the first write by the return of an idle worker", median(back) * 1000, "ms", 20)
        yield Figure("processor time of the return and two writes", used_s / wake * 1000, "ms")
        took_s = asyncio.run(many.first_writes(cold))
        yield at_most(f"{count} first writes to {count} projects at once", took_s, "s", 3)
        busy = asyncio.run(many.work(cold[: options.writers], 10, options.minute))
        yield Figure("projects in which 10 clients each write and read", len(busy.requests), "")
        yield Figure("requests a second, all together, without an error", busy.per_second, "/s")
        yield at_least("the slowest project's share of the mean", busy.least_share, "x", 0.8)
        yield Figure("memory in the end", busy.mib[-1], "MiB")
        yield at_most("its growth in the second half", busy.growth_mib, "MiB", 30)
        errors = [*many.errors()]
        sys.stderr.writelines(f"{line}\n" for line in errors[:20])
        yield at_most("warnings and errors in the server's log", len(errors), "", 0)


async def _use_each(many: ManyProjects, slugs: list[str]) -> None:
    for slug in slugs:
        await many.write(slug)
        await many.read(slug)


GROUPS = {
    "projects": projects,
    "fanout": fanout,
    "stalled": stalled,
    "writers": writers,
    "restart": restart,
    "tasks": tasks,
    "page": page,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: make load ARGS='tasks --tasks 2000 --json'",
    )
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="which to run (default: all)")
    parser.add_argument("--listeners", type=int, default=1000, help="of the fan-out (default: %(default)s)")
    parser.add_argument("--changes", type=int, default=100, help="sent to them in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the fan-out (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=500, help="that follow at once (default: %(default)s)")
    parser.add_argument("--stalled", type=int, default=5, help="of them, that stop reading (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="that a pace is measured (default: %(default)s)")
    parser.add_argument("--writers", type=int, default=50, help="that write at once (default: %(default)s)")
    parser.add_argument("--minute", type=float, default=30, help="seconds that they write (default: %(default)s)")
    parser.add_argument("--projects", type=int, default=30, help="used one after another (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=10_000, help="of the large project (default: %(default)s)")
    parser.add_argument("--views", type=int, default=5, help="of the page in a browser (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    figures: dict[str, list[Figure]] = {}
    for name in options.groups or GROUPS:
        figures[name] = []
        if not options.json:
            print(f"\n{name}")
        for figure in GROUPS[name](options):
            figures[name].append(figure)
            if not options.json:
                print(figure, flush=True)
    broken = [figure.name for group in figures.values() for figure in group if figure.kept is False]
    if options.json:
        print(json.dumps({name: [asdict(figure) for figure in group] for name, group in figures.items()}, indent=2))
    else:
        cores = len(os.sched_getaffinity(0))
        print(f"\n{cores} cores, Python {sys.version.split()[0]}; broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
