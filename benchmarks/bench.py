"""Every figure that we claim, measured side by side in one run: medians and ratios, with their goals.

``make bench`` runs all; name groups to run some: ``python benchmarks/bench.py commands throughput latency memory``.
Machines are shared and noisy, so compared runs alternate, and only ratios are worth quoting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / part) for part in ("examples", "tests")]

from websockets.asyncio.client import ClientConnection, connect  # noqa: E402

from lattice_remote.protocol.messages import (  # noqa: E402
    SUBPROTOCOL,
    Hello,
    Reply,
    Run,
    Welcome,
    decode_server_frame,
    encode,
)
from lattice_remote.server.journal.segment import JournalReader  # noqa: E402
from load_scenarios import fill  # noqa: E402
from sandbox import Client, Process, Programs, Sandbox, Server, board, descendants, wait_for  # noqa: E402

ACTOR = ("--actor", "human:ana")
MIB = 1024 * 1024


@dataclass(frozen=True)
class Figure:
    """One line of the report: name, value, and the goal as text and as a test."""

    name: str
    value: float
    unit: str
    goal: str = ""
    reached: bool | None = None

    def __str__(self) -> str:
        verdict = "" if self.reached is None else ("reached" if self.reached else "MISSED")
        return f"  {self.name:<62} {self.value:>9.2f} {self.unit:<8} {self.goal:<18} {verdict}"


def at_most(name: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(name, value, unit, f"goal <= {goal:g}", value <= goal)


def at_least(name: str, value: float, unit: str, goal: float) -> Figure:
    return Figure(name, value, unit, f"goal >= {goal:g}", value >= goal)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def paired(runs: int, one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float, float]:
    """Alternate two things; return their median seconds and the median of the ratios one/other, pair by pair."""
    one(), other()
    pairs = [(seconds(one), seconds(other)) for _ in range(runs)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def local_project(sandbox: Sandbox, name: str, tasks: int) -> Client:
    """A plain Lattice project in a directory of its own."""
    client = sandbox.client(name)
    client.ok("init", "--project-code", "LAT", "--actor", "human:ana", "--no-setup-agents", "--no-setup-claude")
    for n in range(tasks):
        client.ok("create", f"Task {n}", *ACTOR)
    return client


# --- commands: whole processes ---


def commands(runs: int) -> Iterator[Figure]:
    tasks = 20
    with board("ana") as (server, (ana,)):
        sandbox = Sandbox()
        with sandbox:
            local = local_project(sandbox, "local", tasks)
            for n in range(tasks):
                ana.ok("create", f"Task {n}", *ACTOR)
            text = "a comment of usual length, as people and agents write them"
            remote_s, local_s, ratio = paired(
                runs,
                lambda: ana.ok("comment", "LAT-1", text, *ACTOR),
                lambda: local.ok("comment", "LAT-1", text, *ACTOR),
            )
            yield Figure("lattice comment, remote", remote_s * 1000, "ms")
            yield Figure("lattice comment, local", local_s * 1000, "ms")
            yield at_most("lattice comment, remote / local", ratio, "x", 0.95)
            remote_s, local_s, ratio = paired(runs, lambda: ana.ok("list"), lambda: local.ok("list"))
            yield Figure("lattice list, remote", remote_s * 1000, "ms")
            yield Figure("lattice list, local", local_s * 1000, "ms")
            yield at_most("lattice list, remote / local", ratio, "x", 1.03)
            with two_installations(sandbox) as (with_us, without_us):
                run = lambda python: subprocess.run(  # noqa: E731
                    [python, "-c", "from lattice.cli.main import cli; cli()", "list"],
                    cwd=local.dir, env=local.env, check=True, capture_output=True,
                )  # fmt: skip
                a, b, ratio = paired(runs * 3, lambda: run(with_us), lambda: run(without_us))
            yield Figure("lattice list, no remote, our package installed", a * 1000, "ms")
            yield Figure("lattice list, no remote, our package not installed", b * 1000, "ms")
            yield at_most("lattice list, no remote, with / without our package", ratio, "x", 1.02)
        assert server.process is not None


def launcher(runs: int) -> Iterator[Figure]:
    """Commands by the launcher in a cache, against the same commands in a local project."""
    with board("ana") as (_, (ana,)), Sandbox() as sandbox:
        local = local_project(sandbox, "local", 20)
        for n in range(20):
            ana.ok("create", f"Task {n}", *ACTOR)
        bin_directory = sandbox.root / "launcher"
        ana.ok("remote", "launcher", "install", "--dir", str(bin_directory))

        def launch(*argv: str) -> None:
            subprocess.run(
                [bin_directory / "lattice", *argv],
                cwd=ana.dir, env=ana.env, check=True, capture_output=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip

        launch("list")
        runtime = Path(ana.env["LATTICE_REMOTE_RUNTIME_DIR"])
        wait_for(lambda: list(runtime.glob("warm-*.sock")), "the warm process")
        forced = ("--force", "--reason", "bench")
        goals = {"list": 0.20, "show": 0.20, "comment": 0.25, "status": 0.25, "create": 0.25}
        for name, goal in goals.items():
            count = iter(range(10_000))
            lines = {
                "list": lambda _: ("list",),
                "show": lambda _: ("show", "LAT-1"),
                "comment": lambda _: ("comment", "LAT-1", "a comment of usual length", *ACTOR),
                "status": lambda n: ("status", "LAT-2", ("blocked", "backlog")[n // 2 % 2], *forced, *ACTOR),
                "create": lambda _: ("create", "Another", *ACTOR),
            }  # fmt: skip
            line = lines[name]
            ours, theirs, ratio = paired(
                runs,
                lambda: launch(*line(next(count))),  # noqa: B023
                lambda: local.ok(*line(next(count))),  # noqa: B023
            )
            yield Figure(f"lattice {name} by the launcher", ours * 1000, "ms")
            yield Figure(f"lattice {name}, local", theirs * 1000, "ms")
            yield at_most(f"lattice {name} by the launcher / local", ratio, "x", goal)
        agents = 10
        mix = [("list",), ("show", "LAT-1"), ("comment", "LAT-1", "mixed", *ACTOR), ("create", "Mixed", *ACTOR)]

        def agent(run: Callable[..., object]) -> None:
            for n in range(20):
                run(*mix[n % len(mix)])

        def in_parallel(run: Callable[..., object]) -> None:
            threads = [threading.Thread(target=agent, args=(run,)) for _ in range(agents)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        ours, theirs = seconds(lambda: in_parallel(launch)), seconds(lambda: in_parallel(local.ok))
        yield Figure("10 agents, 20 mixed commands each, by the launcher", ours, "s")
        yield Figure("10 agents, 20 mixed commands each, local", theirs, "s")
        yield at_most("10 agents by the launcher / local", ours / theirs, "x", 0.25)
        shown = ana.run("remote", "launcher", "status", "--dir", str(bin_directory), "--json")
        status = json.loads(shown.stdout)
        yield at_most("the warm process's own memory", status["data"]["warm"]["memory_bytes"] / MIB, "MiB", 45)


@contextlib.contextmanager
def two_installations(sandbox: Sandbox) -> Iterator[tuple[Path, Path]]:
    """Two virtual environments with the same packages, the second without ours; return their interpreters."""
    packages = Path(next(p for p in site.getsitepackages() if Path(p, "lattice").is_dir()))
    source = Path(__file__).resolve().parent.parent / "src" / "lattice_remote"
    pythons = []
    for name in ("with", "without"):
        home = sandbox.root / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        target = next(home.glob("lib/python*/site-packages"))
        for entry in packages.iterdir():
            ours = "lattice_remote" in entry.name
            if entry.suffix == ".pth" or (ours and (name == "without" or not entry.name.endswith(".dist-info"))):
                continue
            (target / entry.name).symlink_to(entry)
        if name == "with":
            (target / "lattice_remote").symlink_to(source)
        pythons.append(home / "bin" / "python")
    yield pythons[0], pythons[1]
    for name in ("with", "without"):
        shutil.rmtree(sandbox.root / name)


# --- rest: requests over a connection that is kept ---


def rest(runs: int) -> Iterator[Figure]:
    """A comment and a list over HTTP, beside the same commands on this machine's own disk."""
    with board("ana") as (server, (ana,)), Sandbox() as sandbox:
        local = local_project(sandbox, "local", 20)
        for n in range(20):
            ana.ok("create", f"Task {n}", *ACTOR)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        headers = {"Authorization": f"Bearer {server.token('human:ana')}", "Content-Type": "application/json"}
        text = "a comment of usual length, as people and agents write them"

        def ask(method: str, path: str, body: str | None = None) -> None:
            connection.request(method, f"/projects/board{path}", body, headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 400, answer.status

        for name, by_http, by_command in (
            (
                "comment",
                lambda: ask("POST", "/tasks/LAT-1/comments", json.dumps({"body": text})),
                lambda: local.ok("comment", "LAT-1", text, *ACTOR),
            ),
            ("list", lambda: ask("GET", "/tasks"), lambda: local.ok("list")),
        ):
            http_s, local_s, ratio = paired(runs, by_http, by_command)
            yield Figure(f"{name} over HTTP", http_s * 1000, "ms")
            yield Figure(f"lattice {name}, local", local_s * 1000, "ms")
            yield at_most(f"{name} over HTTP / lattice {name}, local", ratio, "x", 0.25)
        alone = [seconds(lambda: ask("POST", "/tasks/LAT-1/comments", json.dumps({"body": text}))) for _ in range(100)]
        yield Figure("comment over HTTP, one after the other, p50", statistics.median(alone) * 1000, "ms")
        yield Figure("the same, p99", statistics.quantiles(alone, n=100)[98] * 1000, "ms")
        connection.close()


# --- throughput: commands a second ---

_WARM_LOCAL = """
import contextlib, io, os, sys, time
from lattice.cli.main import cli
count, command = int(sys.argv[1]), sys.argv[2]
def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main(args=list(argv), prog_name="lattice")
run("comment", "LAT-1", "warm up", "--actor", "human:ana")
began = time.perf_counter()
for n in range(count):
    line = ("create",) if command == "create" else ("comment", "LAT-%d" % (n % 20 + 1))
    run(*line, "%s number %d of many" % (command, n), "--actor", "human:ana")
print(count / (time.perf_counter() - began))
"""


def _warm_local(local: Client, command: str, total: int) -> float:
    """Return the commands a second of lattice in one process, each durable."""
    done = subprocess.run(
        [sys.executable, "-c", _WARM_LOCAL, str(total), command],
        cwd=local.dir, env=local.env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


async def _open_writer(server: Server, token: str) -> ClientConnection:
    connection = await connect(
        f"ws://127.0.0.1:{server.port}/projects/board/ws",
        subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        additional_headers={"Authorization": f"Bearer {token}"},
        compression=None,
    )
    await connection.send(encode(Hello(versions=[1], client_version="bench", lattice_version="", follow=False)))
    assert isinstance(decode_server_frame(bytes(await connection.recv(decode=False))), Welcome)
    return connection


async def _throughput(server: Server, token: str, clients: int, total: int, command: str = "comment") -> float:
    """Commands a second of ``clients`` connections that each send their next command when the last is answered.

    They write only: what a follower does with the changes is done on its own machine.
    """

    async def work(connection: ClientConnection, number: int) -> None:
        for n in range(number, total, clients):
            line = ["create"] if command == "create" else ["comment", f"LAT-{n % 20 + 1}"]
            argv = [*line, f"{command} number {n} of many", *ACTOR]
            await connection.send(encode(Run(id=secrets.token_hex(16), argv=argv)))
            reply = decode_server_frame(bytes(await connection.recv(decode=False)))
            assert isinstance(reply, Reply), reply
            assert reply.exit_code == 0, reply

    connections = [await _open_writer(server, token) for _ in range(clients)]
    await work(connections[0], total - clients)  # one, to warm up
    began = time.perf_counter()
    await asyncio.gather(*(work(connection, n) for n, connection in enumerate(connections)))
    rate = total / (time.perf_counter() - began)
    await asyncio.gather(*(connection.close() for connection in connections))
    return rate


def throughput(runs: int) -> Iterator[Figure]:
    rounds, total = max(3, runs // 4), 320
    with board("ana") as (server, (ana,)), Sandbox() as sandbox:
        local = local_project(sandbox, "local", 20)
        for n in range(20):
            ana.ok("create", f"Task {n}", *ACTOR)
        token = server.token("human:ana")
        ana.ok("remote", "agent", "stop")  # clients are on other machines: theirs is not the server's time
        rates: dict[str, list[float]] = {"local": [], "one": [], "many": []}
        for _ in range(rounds):
            rates["local"].append(_warm_local(local, "comment", total))
            rates["one"].append(asyncio.run(_throughput(server, token, 1, total)))
            rates["many"].append(asyncio.run(_throughput(server, token, 32, total)))
        yield Figure("comments a second, one warm local process", statistics.median(rates["local"]), "/s")
        yield Figure("comments a second, 1 client", statistics.median(rates["one"]), "/s")
        yield Figure("comments a second, 32 clients", statistics.median(rates["many"]), "/s")
        ratios = {k: statistics.median(a / b for a, b in zip(rates[k], rates["local"], strict=True)) for k in rates}
        yield at_least("1 client / one warm local process", ratios["one"], "x", 1.0)
        yield at_least("32 clients / one warm local process", ratios["many"], "x", 1.6)


# --- create: a new task beside many ---


def create(runs: int) -> Iterator[Figure]:
    """Create tasks beside 10,000, whose short ids are one file, here and in one warm local process."""
    rounds, total, tasks = max(3, runs // 4), 60, 10_000
    with Sandbox() as sandbox:
        server, local = sandbox.server(), sandbox.client("local")
        server.project()
        server.start()
        token = server.token("human:ana")
        asyncio.run(_throughput(server, token, 1, 1, "create"))
        server.stop()
        fill(server.lattice_dir(), tasks)
        shutil.copytree(server.lattice_dir(), local.lattice_dir)
        server.start()
        rates: dict[str, list[float]] = {"here": [], "local": []}
        for _ in range(rounds):
            rates["local"].append(_warm_local(local, "create", total))
            rates["here"].append(asyncio.run(_throughput(server, token, 1, total, "create")))
        changes = _changes_of(server)
        yield Figure(
            "tasks created a second beside 10,000, one warm local process", statistics.median(rates["local"]), "/s"
        )
        yield Figure("the same, 1 client", statistics.median(rates["here"]), "/s")
        ratio = statistics.median(a / b for a, b in zip(rates["here"], rates["local"], strict=True))
        yield at_least("1 client / one warm local process", ratio, "x", 1.0)
        yield Figure("the file of short ids", (server.lattice_dir() / "ids.json").stat().st_size / 1024, "KiB")
        yield at_most("the change of a new task on the wire", max(map(len, changes)) / 1024, "KiB", 4)


def _changes_of(server: Server) -> list[bytes]:
    """Return the newest changes as they were sent."""
    reader = JournalReader(server.lattice_dir().parent / "journal")
    return [record.change for record in reader.records() if record.change is not None][-20:]


# --- writer: where the time of a command goes ---


class _WithTimers(Programs):
    """Start servers with timers around the stages of a command, see ``stages.py``."""

    def __init__(self, report: Path) -> None:
        self.report = report

    def start(self, program: str, argv: Sequence[str], **options: Any) -> Process:  # noqa: ARG002 - as there
        stages = str(Path(__file__).with_name("stages.py"))
        return subprocess.Popen(
            [sys.executable, stages, "server", self.report, *argv], stdin=subprocess.DEVNULL, **options
        )

    def reset(self, server: Server) -> None:
        self._signal(server, signal.SIGUSR1)

    def read(self, server: Server) -> dict[str, Any]:
        """Return what each process measured since the reset, see ``stages.py``."""
        paths = {name: Path(f"{self.report}.{name}") for name in ("server", "worker")}
        for path in paths.values():
            path.unlink(missing_ok=True)
        self._signal(server, signal.SIGUSR2)
        for name, path in paths.items():
            wait_for(path.exists, f"the report of the {name}")
        return {name: json.loads(path.read_text()) for name, path in paths.items()}

    def _signal(self, server: Server, number: int) -> None:
        assert server.process is not None
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"stages.py\0worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        for pid in (server.process.pid, *workers):
            os.kill(pid, number)


LATTICE_STAGES = ("Click", "lattice's command")


def writer(runs: int) -> Iterator[Figure]:
    """The median microseconds of a comment by process, and of each stage. The timers cost a few percent."""
    rounds, total = max(3, runs // 4), 400
    with tempfile.TemporaryDirectory() as directory:
        programs = _WithTimers(Path(directory, "stages"))
        with board("ana", programs=programs) as (server, (ana,)):
            for n in range(20):
                ana.ok("create", f"Task {n}", *ACTOR)
            token = server.token("human:ana")
            ana.ok("remote", "agent", "stop")
            for clients in (1, 32):
                reports = []
                for _ in range(rounds):
                    programs.reset(server)
                    used, began = time.process_time(), time.perf_counter()
                    asyncio.run(_throughput(server, token, clients, total))
                    wall, client = time.perf_counter() - began, time.process_time() - used
                    measured = programs.read(server)
                    measured["client"] = {"processor": client * 1e6, "wall": wall * 1e6, "microseconds": {}}
                    reports.append(measured)
                yield from _stages(f"{clients} client{'s' * (clients > 1)}", reports, total)


def _stages(name: str, reports: list[dict[str, Any]], total: int) -> Iterator[Figure]:
    commands = total + 1  # that to warm up is counted
    medians = {
        (process, stage): statistics.median(report[process]["microseconds"][stage] for report in reports) / commands
        for process in reports[0]
        for stage in reports[0][process]["microseconds"]
    }
    for process in ("client", "server", "worker"):
        spent = statistics.median(report[process]["processor"] for report in reports) / commands
        yield Figure(f"{name}: processor time of the {process}", spent, "us")
    yield Figure(f"{name}: one command", statistics.median(r["client"]["wall"] for r in reports) / commands, "us")
    for (process, stage), spent in medians.items():
        yield Figure(f"{name}, {process}: {stage}", spent, "us")
    in_turn = {stage: spent for (process, stage), spent in medians.items() if process == "worker" and stage[0] != "("}
    lattices = sum(in_turn[stage] for stage in LATTICE_STAGES)
    yield Figure(f"{name}: lattice's own time", lattices, "us")
    yield at_most(f"{name}: added to it in the worker", sum(in_turn.values()) - lattices, "us", 1000)
    in_server = sum(spent for (process, _), spent in medians.items() if process == "server")
    yield Figure(f"{name}: in the server's process", in_server, "us")


# --- latency: from a command's start here to its files there ---


def latency(runs: int) -> Iterator[Figure]:
    with board("ana", "ben") as (_server, (ana, ben)):
        ana.ok("create", "One", *ACTOR)
        task = json.loads(ana.ok("show", "LAT-1", "--json"))["data"]["id"]
        ben.ok("list")
        log = ben.lattice_dir / "events" / f"{task}.jsonl"
        arrivals, beyond = [], []
        for n in range(runs * 3):
            size = log.stat().st_size
            arrived: list[float] = []
            watcher = threading.Thread(target=_note_growth, args=(log, size, arrived))
            watcher.start()
            began = time.perf_counter()
            ana.ok("comment", "LAT-1", f"number {n}", *ACTOR)
            ended = time.perf_counter()
            watcher.join()
            arrivals.append((arrived[0] - began) * 1000)
            beyond.append((arrived[0] - ended) * 1000)
        quantiles = statistics.quantiles(arrivals, n=100)
        yield Figure("from a command's start to its files elsewhere, p50", statistics.median(arrivals), "ms")
        yield Figure("from a command's start to its files elsewhere, p99", quantiles[98], "ms")
        yield at_most("the same, beyond the command's own time, p50", statistics.median(beyond), "ms", 20)
        yield Figure("the same, beyond the command's own time, p99", statistics.quantiles(beyond, n=100)[98], "ms")


def _note_growth(path: Path, size: int, arrived: list[float]) -> None:
    wait_for(lambda: path.stat().st_size > size, "the change on the other side")
    arrived.append(time.perf_counter())


# --- waiting: from the release of a resource to the answer of who waited for it ---


async def _answered(connection: ClientConnection) -> float:
    reply = decode_server_frame(bytes(await connection.recv(decode=False)))
    assert isinstance(reply, Reply), reply
    assert reply.exit_code == 0, reply
    return time.perf_counter()


async def _wakes(server: Server, token: str, waiters: int, rounds: int) -> list[float]:
    """Pass one resource around between connections that all wait for it; milliseconds from each release to the next."""
    connections = [await _open_writer(server, token) for _ in range(waiters)]

    async def ask(number: int, *argv: str) -> None:
        full = ["resource", *argv, "gpu", "--actor", f"agent:w{number}"]
        await connections[number].send(encode(Run(id=secrets.token_hex(16), argv=full)))

    await ask(0, "acquire")
    await _answered(connections[0])
    taken: list[float] = []
    for number in range(1, waiters):
        await ask(number, "acquire", "--wait")
    for n in range(rounds):
        holder, next_one = n % waiters, (n + 1) % waiters
        await ask(holder, "release")
        released, acquired = await asyncio.gather(_answered(connections[holder]), _answered(connections[next_one]))
        taken.append((acquired - released) * 1000)
        await ask(holder, "acquire", "--wait")
    await asyncio.gather(*(connection.close() for connection in connections))
    return taken


def waiting(runs: int) -> Iterator[Figure]:
    with board("ana") as (server, (ana,)):
        ana.ok("resource", "create", "gpu", *ACTOR)
        taken = asyncio.run(_wakes(server, server.token("human:bench", "agent:*"), 10, max(100, runs * 20)))
        yield Figure("10 wait in line: from a release to the next one's answer, p50", statistics.median(taken), "ms")
        yield at_most("the same, p99", statistics.quantiles(taken, n=100)[98], "ms", 100)
        yield Figure("the same, the longest", max(taken), "ms")


# --- large: small commands beside 100 MB that are sent and fetched ---


def large(runs: int) -> Iterator[Figure]:
    """Comments of another client, alone and while a file is attached here and fetched by all."""
    with board("ana", "ben", "cem") as (server, (ana, _ben, _cem)):
        ana.ok("create", "One", *ACTOR)
        token, path = server.token("human:bench"), ana.dir / "large.bin"
        alone = asyncio.run(_comments(server, token, lambda: False))
        beside: list[float] = []
        took: list[float] = []
        for _ in range(max(2, runs // 5)):
            path.write_bytes(os.urandom(100 * MIB))
            began = time.perf_counter()
            attaching = ana.popen("attach", "LAT-1", str(path), *ACTOR)
            beside += asyncio.run(_comments(server, token, lambda: attaching.poll() is None))  # noqa: B023
            took.append(time.perf_counter() - began)
            assert attaching.wait() == 0, "it was attached"
        yield Figure("100 MB attached, on one machine with its server", statistics.median(took), "s")
        yield Figure("a comment alone, p50", statistics.median(alone), "ms")
        yield Figure("a comment beside it, p50", statistics.median(beside), "ms")
        yield Figure("a comment beside it, p99", statistics.quantiles(beside, n=100)[98], "ms")
        yield Figure("a comment beside it, the longest", max(beside), "ms")


async def _comments(server: Server, token: str, goes_on: Callable[[], bool]) -> list[float]:
    """Comment, one after the other, at least 100 times and while ``goes_on``; return how long each took, in ms."""
    connection = await _open_writer(server, token)
    taken: list[float] = []
    while len(taken) < 100 or goes_on():
        began = time.perf_counter()
        argv = ["comment", "LAT-1", "a small one", "--actor", "human:bench"]
        await connection.send(encode(Run(id=secrets.token_hex(16), argv=argv)))
        taken.append((await _answered(connection) - began) * 1000)
        await asyncio.sleep(0.01)
    await connection.close()
    return taken


# --- editing: from a save in one copy to the text in the other ---


def _seen_in_s(plan: Path, other: Path, text: str) -> float:
    plan.write_text(text)
    return seconds(lambda: wait_for(lambda: other.read_text() == text, "the edit in the other copy"))


def editing(runs: int) -> Iterator[Figure]:
    with board("ana", "ben") as (_server, (ana, ben)):
        ana.ok("create", "Edited", *ACTOR)
        name = next((ana.lattice_dir / "plans").glob("task_*.md")).name
        plans = [client.lattice_dir / "plans" / name for client in (ana, ben)]
        wait_for(plans[1].exists, "the plan in the other copy")
        taken = []
        for n in range(max(60, runs * 10)):
            here, there = plans if n % 2 else plans[::-1]
            taken.append(_seen_in_s(here, there, f"{here.read_text()}- line {n}\n") * 1000)
        yield Figure("a plan saved in one copy is in the other's file, p50", statistics.median(taken), "ms")
        yield at_most("the same, p99", statistics.quantiles(taken, n=100)[98], "ms", 1000)
        line = "- a step, and what is to be done in it, in about eighty letters, as they usually are\n"
        plans[0].write_text(line * 60_000)
        wait_for(lambda: plans[1].stat().st_size == len(line) * 60_000, "the large text in the other copy")
        large = [_seen_in_s(*plans, f"# {n}\n{line * 60_000}") * 1000 for n in range(5)]
        yield Figure("the same of 5 MiB, p50", statistics.median(large), "ms")


# --- memory ---


def used_mib(pid: int) -> float:
    """Memory of a process in MiB, with its part of shared pages (PSS)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(pid)


def memory(_runs: int) -> Iterator[Figure]:
    further, peers = 10, 100
    with Sandbox() as sandbox:
        server = sandbox.started_server()
        token = server.token("human:ana", "agent:*")
        first = sandbox.client("ana", "machine")
        first.add_remote(server, token)
        for n in range(20):
            first.ok("create", f"Task {n}", *ACTOR)
        agent = json.loads(first.ok("remote", "agent", "status", "--json"))["data"]["pid"]
        one = used_mib(agent)
        yield at_most("agent with one cache", one, "MiB", 60)
        for n in range(further):
            sandbox.client(f"further-{n}", "machine").add_remote(server, token)
        yield Figure("agent, each further cache", (used_mib(agent) - one) / further, "MiB")
        assert server.process is not None
        pids = [server.process.pid, *descendants(server.process.pid)]
        few = sum(map(used_mib, pids))
        yield at_most("server with one project and its worker", few, "MiB", 150)
        with asyncio.Runner() as runner:
            connections = runner.run(_open_peers(server, token, peers))
            many = sum(map(used_mib, pids))
            runner.run(_close_peers(connections))
        yield Figure("server, each further connected client", (many - few) / peers, "MiB")


async def _open_peers(server: Server, token: str, count: int) -> list[ClientConnection]:
    connections = []
    for _ in range(count):
        connection = await connect(
            f"ws://127.0.0.1:{server.port}/projects/board/ws",
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
        )
        await connection.send(encode(Hello(versions=[1], client_version="bench", lattice_version="")))
        await connection.recv()
        connections.append(connection)
    return connections


async def _close_peers(connections: list[ClientConnection]) -> None:
    await asyncio.gather(*(connection.close() for connection in connections))


GROUPS = {
    "commands": commands,
    "launcher": launcher,
    "rest": rest,
    "throughput": throughput,
    "create": create,
    "writer": writer,
    "latency": latency,
    "waiting": waiting,
    "large": large,
    "editing": editing,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="which to run (default: all)")
    parser.add_argument("--runs", type=int, default=15, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    figures: list[Figure] = []
    for name in options.groups or GROUPS:
        if not options.json:
            print(f"\n{name}")
        for figure in GROUPS[name](options.runs):
            figures.append(figure)
            if not options.json:
                print(figure, flush=True)
    if options.json:
        print(json.dumps([figure.__dict__ for figure in figures], indent=2))
    missed = [figure.name for figure in figures if figure.reached is False]
    if not options.json:
        cores = len(os.sched_getaffinity(0))
        print(f"\n{cores} cores, Python {sys.version.split()[0]}; missed: {', '.join(missed) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
