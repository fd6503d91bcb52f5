"""Measurements of one server with many clients, for ``make load`` and, in small, for the tests of load."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from idle_subscriber import listeners
from lattice_remote.protocol.messages import Reply
from lattice_remote.protocol.operations import canonical_json
from memory_client import MemoryClient, close_all
from request_client import Light, several
from sandbox import Client, Sandbox, Server, descendants, differences, wait_for

__all__ = [
    "BY",
    "Pace",
    "Stalled",
    "Storm",
    "Turn",
    "a_busy_log",
    "agent_mib",
    "fill",
    "greed",
    "grow_log",
    "server_mib",
    "stalled_clients",
    "storm",
    "writers_at_once",
]

BY = ("--actor", "agent:load")


def used_mib(*pids: int) -> float:
    """Return the memory of processes in MiB; a page that several share counts once (PSS)."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
    return total


def server_mib(server: Server) -> float:
    """Return the memory of a server and its processes, in MiB."""
    assert server.process is not None
    return used_mib(server.process.pid, *descendants(server.process.pid))


def agent_mib(client: Client) -> float:
    """Return the memory of a client's agent, in MiB."""
    return used_mib(_agent_pid(client))


# --- a pace ---


@dataclass
class Pace:
    """Times of writes, in seconds."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Writes a second."""
        return len(self.latencies) / self.seconds

    @property
    def p50_ms(self) -> float:
        """Median time of a write."""
        return statistics.median(self.latencies) * 1000

    @property
    def p99_ms(self) -> float:
        """Time that one write in a hundred exceeds."""
        return statistics.quantiles(self.latencies, n=100)[98] * 1000


async def write_for(clients: list[Light], until: Callable[[], bool], text: str) -> Pace:
    """Let each client send one comment after the other until ``until()``."""
    pace, began = Pace(), time.monotonic()

    async def write(client: Light) -> None:
        while not until():
            sent = time.monotonic()
            await client.ok("comment", "LAT-1", text, *BY)
            pace.latencies.append(time.monotonic() - sent)

    await asyncio.gather(*map(write, clients))
    pace.seconds = time.monotonic() - began
    return pace


def over(seconds: float) -> Callable[[], bool]:
    """Return a condition that becomes true after this time."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


# --- stalled clients ---


@dataclass
class Stalled:
    """Result of stalled clients among many."""

    clients: int
    before: Pace
    during: Pace
    mib_per_client: float
    mib_growth: float
    """How much the server grew, at most, from when they stalled."""
    cut_after_s: float
    """When the last of them was cut."""
    caught_up_s: float
    """How long it took the last of them to equal the server again."""


def stalled_clients(sandbox: Sandbox, *, clients: int, stalled: int, seconds: float, until_cut: bool = True) -> Stalled:
    """Write beside ``clients`` that follow, then with ``stalled`` real agents among them that have stopped reading.

    With ``until_cut`` the second part lasts until the server has ended the stalled connections.

    Raises:
        AssertionError: a client was lost, or a stalled one does not come to equal the others.
    """
    server, token, agents = _board(sandbox, [f"stalled-{number}" for number in range(stalled)])
    return asyncio.run(_stall(server, token, agents, clients - stalled, seconds, until_cut))


async def _stall(
    server: Server, token: str, agents: list[Client], others: int, seconds: float, until_cut: bool
) -> Stalled:
    text = "a comment of some length, so that what is not taken adds up: " + "x" * 4000
    alone = server_mib(server)
    async with listeners(others, server.url, token) as followers, several(4, server.url, token) as writers:
        mib_per_client = (server_mib(server) - alone) / others
        before = await write_for(writers, over(seconds), text)
        pids = [_agent_pid(agent) for agent in agents]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        began, cut = time.monotonic(), _cuts(server)
        first, peak, cut_after = server_mib(server), 0.0, 0.0

        async def watch() -> None:
            """Look at the server until the stalled clients are cut."""
            nonlocal peak, cut_after
            end = over(seconds)
            while (until_cut and not cut_after) or not end():
                await asyncio.sleep(0.1)
                peak = max(peak, server_mib(server))
                if not cut_after and _cuts(server) - cut >= len(agents):
                    cut_after = time.monotonic() - began
                assert time.monotonic() - began < 120, "the stalled clients were not cut"

        watching = asyncio.create_task(watch())
        during = await write_for(writers, watching.done, text)
        await watching
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        head = max(follower.seq for follower in followers)
        await _until(lambda: all(follower.seq == head for follower in followers), "every follower to be at the head")
        assert not any(follower.is_lost for follower in followers)
    began = time.monotonic()
    for agent in agents:
        wait_for(lambda: not differences(agent.lattice_dir, server.lattice_dir()), f"{agent.dir.name} to be back", 60)  # noqa: B023
    back = time.monotonic() - began
    return Stalled(others + len(agents), before, during, mib_per_client, peak - first, cut_after, back)


def _cuts(server: Server) -> int:
    """Return the server's count of ended connections."""
    return server.log.read_text().count(": disconnected\n")


def _agent_pid(client: Client) -> int:
    return int(json.loads(client.ok("remote", "agent", "status", "--json"))["data"]["pid"])


# --- many writers ---


@dataclass
class Turn:
    """Number of writes of each client."""

    counts: list[int]
    pace: Pace

    @property
    def slowest_share(self) -> float:
        """Of the mean; 1 if all are equal."""
        return min(self.counts) / statistics.mean(self.counts)


def writers_at_once(sandbox: Sandbox, *, clients: int, seconds: float) -> Turn:
    """Let clients write at once, each its next when the last is answered; every answer must be a success."""
    server, token, _ = _board(sandbox, [])

    async def run() -> Turn:
        async with several(clients, server.url, token) as writers:
            paces = [write_for([writer], over(seconds), "a comment") for writer in writers]
            done = await asyncio.gather(*paces)
        latencies = [latency for pace in done for latency in pace.latencies]
        return Turn([len(pace.latencies) for pace in done], Pace(seconds, latencies))

    return asyncio.run(run())


def greed(sandbox: Sandbox, *, in_flight: int, seconds: float) -> tuple[Pace, Pace]:
    """Return a client's pace alone, and beside one that keeps ``outstanding`` requests under way."""
    server, token, _ = _board(sandbox, [])

    async def run() -> tuple[Pace, Pace]:
        async with several(2, server.url, token) as (modest, greedy):
            alone = await write_for([modest], over(seconds), "a comment")
            end = over(seconds)
            many = asyncio.create_task(write_for([greedy] * in_flight, end, "another"))
            beside = await write_for([modest], end, "a comment")
            await many
            return alone, beside

    return asyncio.run(run())


# --- a restart ---


@dataclass
class Storm:
    """Times of the clients' return after a restart, in seconds since the server listens."""

    first_s: float
    median_s: float
    last_s: float
    failed_attempts: float
    """For each client, on average; the cut itself counts as one."""


def storm(sandbox: Sandbox, *, clients: int, kill: bool) -> Storm:
    """Restart a server with ``clients`` clients, while one writes; each must return, and equal the server."""
    server, token, _ = _board(sandbox, [])

    async def run() -> Storm:
        first = MemoryClient(server.url, token)
        first.start()
        await first.current()
        crowd = [first, *(MemoryClient(server.url, token, after=first) for _ in range(clients - 1))]
        for client in crowd[1:]:
            client.start()
        try:
            await asyncio.gather(*(client.current() for client in crowd))
            return await _restart(server, token, crowd, kill=kill)
        finally:
            await close_all(crowd)

    return asyncio.run(run())


async def _restart(server: Server, token: str, crowd: list[MemoryClient], *, kill: bool) -> Storm:
    attempts = sum(client.link.failed_attempts for client in crowd)
    await asyncio.to_thread(server.kill if kill else server.stop)
    await _until(lambda: not any(client.link.is_open for client in crowd), "every client to notice")
    await asyncio.to_thread(server.start)
    began = time.monotonic()
    times = await asyncio.gather(*(_back_after(client, began) for client in crowd))
    failed = (sum(client.link.failed_attempts for client in crowd) - attempts) / len(crowd)
    async with Light(server.url, token) as writer:
        await writer.ok("comment", "LAT-1", "after the storm", *BY)
        seq = writer.welcome.head + 1
    await asyncio.gather(*(client.current(seq) for client in crowd))
    assert len({client.digest() for client in crowd}) == 1
    assert crowd[0].files == {path: (server.lattice_dir() / path).read_bytes() for path in crowd[0].files}
    assert not any(client.resyncs for client in crowd[1:]), "a restart is no reason to compare everything"
    return Storm(min(times), statistics.median(times), max(times), failed)


async def _back_after(client: MemoryClient, began: float) -> float:
    assert await client.link.changed.until(lambda: client.link.is_open and client.is_current, 120), client.link.error
    return time.monotonic() - began


# --- large projects ---


def fill(lattice_dir: Path, tasks: int) -> None:
    """Write tasks into a stopped server's project, as lattice does; it has one task, LAT-1."""
    from lattice.core.events import serialize_event
    from lattice.core.ids import generate_event_id, generate_task_id
    from lattice.core.tasks import apply_event_to_snapshot, serialize_snapshot

    ids = json.loads((lattice_dir / "ids.json").read_text())
    model = json.loads((lattice_dir / "events" / f"{ids['map']['LAT-1']}.jsonl").read_text())
    with (lattice_dir / "events/_lifecycle.jsonl").open("a") as lifecycle:
        for number in range(2, tasks + 1):
            task, title = generate_task_id(), f"Task number {number} of many"
            data = {**model["data"], "title": title, "short_id": f"LAT-{number}"}
            event = {**model, "id": generate_event_id(), "task_id": task, "data": data}
            (lattice_dir / "events" / f"{task}.jsonl").write_text(serialize_event(event))
            lifecycle.write(serialize_event(event))
            (lattice_dir / "tasks" / f"{task}.json").write_text(
                serialize_snapshot(apply_event_to_snapshot(None, event))
            )
            (lattice_dir / "plans" / f"{task}.md").write_text(f"# LAT-{number}: {title}\n")
            ids["map"][f"LAT-{number}"] = task
    ids["next_seqs"]["LAT"] = tasks + 1
    (lattice_dir / "ids.json").write_bytes(canonical_json(ids))


def grow_log(lattice_dir: Path, megabytes: float) -> None:
    """Make the log of LAT-1 large, with events of a kind of its own; no server runs."""
    task = json.loads((lattice_dir / "ids.json").read_text())["map"]["LAT-1"]
    log = lattice_dir / "events" / f"{task}.jsonl"
    from lattice.core.events import serialize_event

    model = json.loads(log.read_text().splitlines()[0])
    line = serialize_event({**model, "type": "x_padding", "data": {"padding": "x" * 1000}})
    with log.open("a") as file:
        file.write(line * int(megabytes * 1024 * 1024 / len(line)))


@contextlib.asynccontextmanager
async def a_busy_log(server: Server, token: str) -> AsyncIterator[list[float]]:
    """Let four clients write into the log of LAT-1 within the block; yield the times of their writes."""
    ended, pace = asyncio.Event(), []

    async def write(client: Light) -> None:
        while not ended.is_set():
            began = time.monotonic()
            reply = await client.run("comment", "LAT-1", "once more", *BY)
            assert isinstance(reply, Reply), reply
            pace.append(time.monotonic() - began)

    async with several(4, server.url, token) as clients:
        writing: list[Awaitable[None]] = [asyncio.create_task(write(client)) for client in clients]
        try:
            yield pace
        finally:
            ended.set()
            await asyncio.gather(*writing)


# --- shared parts ---


def _board(sandbox: Sandbox, names: list[str]) -> tuple[Server, str, list[Client]]:
    """A started server with one task, a token, and connected clients on machines of their own."""
    server = sandbox.started_server()
    token = server.token("human:ana", "agent:*")
    made = []
    for name in names:
        client = sandbox.client(name)
        client.add_remote(server, token)
        made.append(client)

    async def create() -> None:
        async with Light(server.url, token) as client:
            await client.ok("create", "One", *BY)

    asyncio.run(create())
    return server, token, made


async def _until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s:.0f} s for {what}"
        await asyncio.sleep(0.01)
