"""Fan-out of changes to many clients, beside the plainest server that sends the same bytes; ``load.py`` prints it.

The file is also the programs that it starts:

    python benchmarks/fanout.py broadcast            a server with ``websockets.broadcast``
    python benchmarks/fanout.py streams              a Starlette application on uvicorn with event streams
    python benchmarks/fanout.py read KIND URL TOKEN COUNT    clients; some stop reading on request
    python benchmarks/fanout.py serve FILE ARGUMENTS...    as lattice-remote; notes in FILE the time of each commit
    python benchmarks/fanout.py watch FILE           sizes of a file, with the time at which each was seen

All servers run on uvloop. Clients run in a process of their own, and the processor time of a server is that of its
process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent / part) for part in ("tests", "examples")]

import msgspec  # noqa: E402

from idle_subscriber import listeners  # noqa: E402
from lattice_remote.protocol.messages import SUBPROTOCOL, Limits, Welcome, encode  # noqa: E402
from lattice_remote.server.journal.segment import JournalReader  # noqa: E402
from load_scenarios import BY, server_mib  # noqa: E402
from request_client import Light, several  # noqa: E402
from sandbox import Process, Programs, Sandbox, Server, board, wait_for  # noqa: E402

__all__ = ["Delay", "FanOut", "Rate", "commit_to_file", "fan_out"]

WRITERS = 8
TEXT = "a comment of some length, as agents write them: " + "x" * 1000
LAST_EVENT = b"event: change\n"
"""Of each change in an event stream."""


@dataclass(frozen=True)
class Rate:
    """One round: messages that clients received per second, and the server's processor time for each."""

    per_second: float
    processor_us: float


@dataclass
class FanOut:
    """Rounds of one kind of stream, by turns: of the plain server, ours, and ours with stalled clients."""

    plain: list[Rate] = field(default_factory=list)
    ours: list[Rate] = field(default_factory=list)
    beside_stalled: list[Rate] = field(default_factory=list)
    growth_mib: float = 0.0
    """Of our server and its worker beside the stalled clients."""

    def ratio(self, rounds: list[Rate]) -> float:
        """Return the median of the ratios to the plain server's round of the same turn."""
        count = len(rounds)
        plain = self.plain[:count] if rounds is self.ours else self.plain[-count:]
        return statistics.median(a.per_second / b.per_second for a, b in zip(rounds, plain, strict=True))


def fan_out(sandbox: Sandbox, kind: str, *, clients: int, stalled: int, changes: int, rounds: int) -> FanOut:
    """Send changes to ``clients``; ``kind`` is ``websocket`` or ``sse``. Each turn sends the same bytes twice."""
    server = sandbox.started_server()
    token, readers_token = server.token("human:ana", "agent:*"), server.token("human:ben")
    asyncio.run(_create(server, token))
    done = FanOut()
    plain = _Peer("broadcast" if kind == "websocket" else "streams")
    with plain, _Peer("read", kind, server.url, readers_token, clients) as readers:
        plain_url = f"http://127.0.0.1:{plain.answer()}"
        readers.answer()
        with _Peer("read", kind, plain_url, readers_token, clients) as plain_readers:
            plain_readers.answer()

            def turn() -> tuple[Rate, Rate]:
                ours, messages = _our_round(server, token, kind, readers, changes)
                return ours, _plain_round(plain, plain_readers, messages, sandbox.root / "messages")

            turn()  # to warm up
            for _ in range(rounds):
                ours, beside = turn()
                done.ours.append(ours)
                done.plain.append(beside)
            readers.say(f"stall {stalled}")
            readers.answer()
            before = server_mib(server)
            for _ in range(rounds):
                ours, beside = turn()
                done.beside_stalled.append(ours)
                done.plain.append(beside)
                done.growth_mib = max(done.growth_mib, server_mib(server) - before)
    server.stop()
    return done


async def _create(server: Server, token: str) -> None:
    async with Light(server.url, token) as client:
        await client.ok("create", "One", *BY)


def _our_round(server: Server, token: str, kind: str, readers: _Peer, changes: int) -> tuple[Rate, list[bytes]]:
    """Write, and wait until every client has all changes; return the messages as well."""
    assert server.process is not None
    pid = server.process.pid
    head = asyncio.run(_head(server, token))
    readers.say(f"expect {changes}")
    readers.answer()
    used, began = _processor_ns(pid), time.monotonic()
    asyncio.run(_write(server, token, changes))
    ended, received = map(float, readers.answer().split())
    rate = Rate(received / (ended - began), (_processor_ns(pid) - used) / 1000 / received)
    read = _changes if kind == "websocket" else _events
    return rate, read(server, token, head, changes)


def _plain_round(plain: _Peer, readers: _Peer, messages: list[bytes], path: Path) -> Rate:
    path.write_bytes(msgspec.msgpack.encode(messages))
    readers.say(f"expect {len(messages)}")
    readers.answer()
    used, began = _processor_ns(plain.pid), time.monotonic()
    plain.say(str(path))
    ended, received = map(float, readers.answer().split())
    return Rate(received / (ended - began), (_processor_ns(plain.pid) - used) / 1000 / received)


async def _head(server: Server, token: str) -> int:
    async with Light(server.url, token) as client:
        return client.welcome.head


async def _write(server: Server, token: str, changes: int) -> None:
    """Write from several clients at once, so that the server always has the next change."""
    left = iter(range(changes))

    async def write(client: Light) -> None:
        for _ in left:
            await client.ok("comment", "LAT-1", TEXT, *BY)

    async with several(WRITERS, server.url, token) as writers:
        await asyncio.gather(*map(write, writers))


def _changes(server: Server, _token: str, head: int, count: int) -> list[bytes]:
    """Return the changes after ``head`` as they were sent."""
    reader = JournalReader(server.lattice_dir().parent / "journal")
    found: list[bytes] = []
    while len(found) < count:
        found += [change for _, change in reader.read(head + len(found), head + count, 1 << 24) or ()]
    return found


def _events(server: Server, token: str, head: int, count: int) -> list[bytes]:
    """Return the events of each change after ``head`` as they were sent."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        headers = {"Authorization": f"Bearer {token}"}
        connection.request("GET", f"/projects/board/events/stream?since={head}", headers=headers)
        response = connection.getresponse()
        received = b""
        while received.count(LAST_EVENT) < count or not received.endswith(b"\n\n"):
            received += response.read1()
    return re.findall(rb"(?s).*?" + LAST_EVENT + rb".*?\n\n", received[received.index(b"event: task_event") :])


def _processor_ns(pid: int) -> int:
    """Return the processor time of a process, without that of its children."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


# --- commit to file ---


class _NotingCommits(Programs):
    """Start servers that note the time of each commit."""

    def __init__(self, path: Path) -> None:
        self.notes = path

    def start(self, program: str, argv: Sequence[str], **options: Any) -> Process:  # noqa: ARG002 - as there
        return subprocess.Popen([sys.executable, __file__, "serve", self.notes, *argv], **options)


@dataclass
class Delay:
    """Milliseconds from each commit to the change of a cache's file."""

    milliseconds: list[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.milliseconds, n=100)[98]


def commit_to_file(*, clients: int, seconds: float) -> Delay:
    """Have clients write once a second each, as many others follow, and watch a file in a cache.

    A change is committed when the server's process knows that it is durable.
    """
    with tempfile.TemporaryDirectory() as directory:
        commits = Path(directory, "commits")
        with board("ana", programs=_NotingCommits(commits)) as (server, (ana,)):
            token = server.token("human:ben", "agent:*")
            asyncio.run(_create(server, token))
            (log,) = (server.lattice_dir() / "events").glob("task_*.jsonl")
            copy = ana.lattice_dir / "events" / log.name
            wait_for(copy.exists, "the task in the cache")
            with _Peer("watch", copy) as watcher, _Peer("read", "websocket", server.url, token, clients) as readers:
                watcher.answer()
                readers.answer()
                asyncio.run(_write_at_times(server, token, clients, seconds))
                watcher.say(str(log.stat().st_size))
                seen = msgspec.json.decode(watcher.answer(), type=list[tuple[float, int]])
            ends = list(accumulate(map(len, log.read_bytes().splitlines(keepends=True))))
        times = list(map(float, commits.read_text().split()))
    assert len(times) == len(ends), "each change is a line"
    delays, place = [], 0
    for time_, end in list(zip(times, ends, strict=True))[1:]:  # the first is the task itself
        while seen[place][1] < end:
            place += 1
        delays.append((seen[place][0] - time_) * 1000)
    return Delay(delays)


async def _write_at_times(server: Server, token: str, clients: int, seconds: float) -> None:
    end = time.monotonic() + seconds

    async def write(client: Light, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        while time.monotonic() < end:
            next_at = time.monotonic() + 1
            await client.ok("comment", "LAT-1", "a comment of usual length, as people and agents write them", *BY)
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async with several(clients, server.url, token) as writers:
        await asyncio.gather(*(write(writer, number / clients) for number, writer in enumerate(writers)))


# --- programs ---


class _Peer:
    """One of this file's programs; it takes lines and answers each with one."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the program has ended"
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()


def _print(*values: object) -> None:
    print(*values, flush=True)


async def _lines() -> AsyncIterator[str]:
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield line.strip()


def _stored(path: str) -> list[bytes]:
    return msgspec.msgpack.decode(Path(path).read_bytes(), type=list[bytes])


async def broadcast() -> None:
    """Send the messages of each named file to all clients with ``websockets.broadcast``."""
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients: set[ServerConnection] = set()

    async def handle(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(encode(Welcome(1, "", "", "", "", "e", 0, 0, resync=False, limits=Limits(1, 1, 1))))
        clients.add(connection)
        await connection.wait_closed()

    options = {"compression": None, "subprotocols": [SUBPROTOCOL], "ping_interval": None}
    async with serve(handle, "127.0.0.1", 0, backlog=2048, **options) as server:  # type: ignore[arg-type]
        _print(next(iter(server.sockets)).getsockname()[1])
        async for path in _lines():
            for message in _stored(path):
                broadcast(clients, message)
                await asyncio.sleep(0)


async def streams() -> None:
    """Send the messages of each named file to all event streams; each stream waits for the next."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    sent: list[bytes] = []
    news = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        place = len(sent)
        yield LAST_EVENT + b"\n"
        while True:
            while place < len(sent):
                yield sent[place]
                place += 1
            await news.wait()

    async def stream(_: Request) -> StreamingResponse:
        return StreamingResponse(body(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/projects/board/events/stream", stream)])
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _print(listener.getsockname()[1])
    async for path in _lines():
        for message in _stored(path):
            sent.append(message)
            news.set()
            news.clear()
            await asyncio.sleep(0)
    await serving


class _Stream(asyncio.Protocol):
    """An event stream that counts changes."""

    def __init__(self, head: bytes) -> None:
        self._head, self._end = head, b""
        self.transport: asyncio.Transport
        self.frames = 0
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._head)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        self.frames += (self._end + data).count(LAST_EVENT) + (not self.frames and b"event: position" in data)
        self._end = data[1 - len(LAST_EVENT) :]

    def close(self) -> None:
        self.transport.abort()


@asynccontextmanager
async def _streams(count: int, url: str, token: str) -> AsyncIterator[list[_Stream]]:
    """Event streams, each after its first event."""
    parts = urlsplit(url)
    request = (
        f"GET /projects/board/events/stream HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {token}\r\n\r\n"
    )
    made = []
    for _ in range(count):
        _, stream = await asyncio.get_running_loop().create_connection(
            lambda: _Stream(request.encode()), parts.hostname, parts.port
        )
        made.append(stream)
    await _until(lambda: all(stream.frames for stream in made))
    yield made
    for stream in made:
        stream.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - each look is cheap, and no client may wake another task
            await asyncio.sleep(0.002)


async def read(kind: str, url: str, token: str, count: str) -> None:
    """Open clients. ``expect N`` is answered at once, then with time and count when each has N more messages.

    ``stall N``: the first N stop reading; later counts omit them.
    """
    opened = listeners if kind == "websocket" else _streams
    async with opened(int(count), url, token) as clients:
        reading = list(clients)
        _print("ready")
        async for line in _lines():
            command, number = line.split()
            if command == "stall":
                for client in reading[: int(number)]:
                    transport = client.transport
                    transport.pause_reading()
                    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reading = reading[int(number) :]
                _print("stalled")
            else:
                wanted = [client.frames + int(number) for client in reading]
                _print("expecting")
                await _until(lambda: all(client.frames >= most for client, most in zip(reading, wanted, strict=True)))  # noqa: B023
                _print(time.monotonic(), len(reading) * int(number))
                assert not any(client.is_lost for client in reading), "the server has cut one"


def serve(path: str, *arguments: str) -> None:
    """Run a server that notes when it learns of each durable change."""
    from lattice_remote.server import cli
    from lattice_remote.server.project.history import History

    notes = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    publish = History.publish

    def noting(self: History, *arguments: Any, **options: Any) -> None:
        os.write(notes, b"%f\n" % time.monotonic())
        publish(self, *arguments, **options)

    History.publish = noting  # type: ignore[method-assign]
    sys.argv = ["lattice-remote", *arguments]
    sys.exit(cli.main())


def watch(path: str) -> None:
    """Note the sizes of a file until it has the size of the line that comes."""
    seen: list[tuple[float, int]] = []
    _print("watching")
    os.set_blocking(0, False)
    wanted, line = -1, b""
    while not seen or seen[-1][1] != wanted:
        size = os.stat(path).st_size
        if not seen or seen[-1][1] != size:
            seen.append((time.monotonic(), size))
        time.sleep(0.0002)
        with contextlib.suppress(BlockingIOError):
            line += os.read(0, 100)
            if line.endswith(b"\n"):
                wanted = int(line)
    _print(msgspec.json.encode(seen).decode())


def main(program: str, *arguments: str) -> None:
    if program in ("serve", "watch"):
        {"serve": serve, "watch": watch}[program](*arguments)
        return
    import uvloop

    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run({"broadcast": broadcast, "streams": streams, "read": read}[program](*arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
