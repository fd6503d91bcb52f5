"""Event streams of a server in the test's process: heartbeats, slow listeners, resets and expired history."""

import asyncio
import contextlib
import re
import resource
import secrets
import socket
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Running, hello, make_data, serving, until
from websockets.asyncio.client import ClientConnection

from lattice_remote.protocol.messages import Change, Position, Reply, Run, Welcome, decode_server_frame, encode
from lattice_remote.server.http import sse
from sse import Event, Listening

TASK = f"task_{'0' * 26}"
PATH = f"tasks/{TASK}.json"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_data(tmp_path / "data")
    async with serving(data, token) as server:
        yield server


@contextlib.asynccontextmanager
async def listening(running: Running, **options: str) -> AsyncIterator[Listening]:
    """Listen from a thread, because the server runs in this one."""
    opened = await asyncio.to_thread(lambda: Listening(running.port, running.token, **options))  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        await asyncio.to_thread(opened.close)


async def take(opened: Listening, count: int) -> list[Event]:
    return await asyncio.to_thread(opened.take, count)


async def snapshots(opened: Listening, count: int) -> list[Event]:
    """Return the snapshots of ``count`` changes; each comes with the change itself."""
    events = await take(opened, 2 * count)
    assert [event.kind for event in events[1::2]] == ["change"] * count
    return events[::2]


@contextlib.asynccontextmanager
async def writing(running: Running, *, follow: bool = False) -> AsyncIterator[ClientConnection]:
    async with running.connected() as client:
        await client.send(hello(follow=follow))
        assert isinstance(decode_server_frame(await client.recv()), Welcome)  # type: ignore[arg-type]
        yield client


async def put(client: ClientConnection, text: str, path: str = PATH) -> None:
    await client.send(encode(Run(secrets.token_hex(16), ["put", path, text])))
    while not isinstance(frame := decode_server_frame(await client.recv()), Reply):  # type: ignore[arg-type]
        assert isinstance(frame, Change)


async def test_an_idle_stream_sends_its_position(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    async with listening(running) as opened, writing(running) as client:
        taking = asyncio.create_task(take(opened, 2))
        await until(lambda: len(opened.positions) >= 3)
        await put(client, "{}")
        [event, _] = await taking
        assert {each.data["seq"] for each in opened.positions} == {0}
        assert all(event.id.startswith(f"{each.data['epoch']}-1-") for each in opened.positions)


async def test_a_page_gets_one_event_a_change_from_the_head_on(running: Running) -> None:
    """The page reads the board again after each change, so it needs no contents and no replay."""
    async with writing(running) as client:
        await put(client, "{}")
        first = await position_of(running, 1)
        async with listening(running, path="dashboard/remote/events", last=first) as opened:
            await put(client, '{"n": 2}')
            await put(client, '{"n": 3}')
            events = await take(opened, 2)
    assert [event.id for event in events] == [await position_of(running, 2), await position_of(running, 3)]
    assert {event.kind for event in events} == {"change"} and events[0].data["tasks"] == [TASK]
    assert [event.id for event in opened.positions] == [first]


async def position_of(running: Running, seq: int) -> str:
    history = running.registry.project("web").history
    mark = await history.mark_at(seq)
    assert mark is not None
    return str(Position(history.epoch, seq, mark))


async def test_a_new_epoch_ends_the_stream_and_the_next_begins_with_a_reset(running: Running) -> None:
    async with writing(running) as client:
        await put(client, "{}")
    async with listening(running, since="0") as opened:
        [_, first] = await take(opened, 2)
        project = running.registry.project("web")
        await project.rollback_proved(project.history.epoch, "a test says so")
        assert await asyncio.to_thread(list, opened) == []
    assert not first.id.startswith(project.history.epoch)
    async with listening(running, last=first.id) as opened, writing(running) as client:
        [reset] = await take(opened, 1)
        assert (reset.kind, reset.data["reason"], reset.data["epoch"]) == ("reset", "epoch", project.history.epoch)
        await put(client, '{"n": 2}')
        assert (await take(opened, 1))[0].data["snapshot"] == {"n": 2}


async def test_a_position_before_the_retention_gets_a_reset(running: Running) -> None:
    async with writing(running) as client:
        for n in range(4):
            await put(client, f'{{"n": {n}}}')
    history = running.registry.project("web").history
    history.oldest = 3
    async with listening(running, since=await position_of(running, 1)) as opened:
        [reset] = await take(opened, 1)
        assert (reset.kind, reset.data["reason"], reset.data["seq"]) == ("reset", "expired", 4)
    async with listening(running, since=await position_of(running, 2)) as opened:
        assert [event.data["snapshot"]["n"] for event in await snapshots(opened, 2)] == [2, 3]


async def test_events_are_made_once_for_listeners_that_reconnect_together(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(running) as client:
        for n in range(20):
            await put(client, f'{{"n": {n}}}')
    made: list[int] = []
    original = sse.events_of
    monkeypatch.setattr(sse, "events_of", lambda change: made.append(change.seq) or original(change))
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(listening(running, since="0")) for _ in range(10)]
        for one in opened:
            assert [event.data["snapshot"]["n"] for event in await snapshots(one, 20)] == list(range(20))
    assert made == list(range(1, 21))


async def test_a_client_that_reads_nothing_is_disconnected_and_delays_no_other(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10: bounded in bytes. The other listeners and clients are notified without delay."""
    monkeypatch.setattr(sse, "_MAX_PENDING_BYTES", 1_000_000)
    loop, large = asyncio.get_running_loop(), '{"x": "' + "x" * 200_000 + '"}'
    async with listening(running) as opened, writing(running, follow=True) as client:
        lazy = await stalled(running)
        await until(lambda: len(streams_of(running)) == 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        slowest = 0.0
        for n in range(60):
            began = loop.time()
            await put(client, large)
            [_, event] = await take(opened, 2)
            slowest = max(slowest, loop.time() - began)
            assert event.id == await position_of(running, n + 1)
        await until(lambda: len(streams_of(running)) == 1)
        assert slowest < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 * 1024  # KiB
        lazy.close()


async def test_a_listener_that_reads_nothing_is_cut_at_its_deadline(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "_MAX_PENDING_BYTES", 1 << 30)
    lazy = await stalled(running)
    await until(lambda: streams_of(running))
    [one] = streams_of(running)
    one._outbox._deadline_s = 0.3
    async with writing(running) as client:
        for _ in range(40):  # more than any system buffers for a connection
            await put(client, '{"x": "' + "x" * 250_000 + '"}')
    await until(lambda: not streams_of(running))
    lazy.close()


class Batch(list[tuple[int, bytes]]):
    """A batch that supports weak references."""


async def test_a_listener_that_stalls_while_catching_up_uses_little_memory(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with writing(running) as client:
        for _ in range(24):
            await put(client, '{"x": "' + "x" * 250_000 + '"}')
    history, read = running.registry.project("web").history, list[weakref.ref[Batch]]()
    original = history.changes_after

    async def reading(seq: int) -> Batch:
        batch = Batch(await original(seq))
        read.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(history, "changes_after", reading)
    lazy = await stalled(running, "?since=0")
    await until(lambda: read and not any(batch() for batch in read))
    assert len(streams_of(running)) == 1, "it was not cut yet"
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    said = bytearray()
    last = await position_of(running, 24)
    while f"id: {last}\n".encode() not in said[-500_000:]:
        said += await asyncio.get_running_loop().sock_recv(lazy, 1 << 20)
    told = re.findall(rb"^id: \w+-(\d+)(?:-\w+)?$", said, re.MULTILINE)  # of the last event of each
    assert [int(seq) for seq in told] == list(range(25)), "the first says where it begins"
    lazy.close()


def streams_of(running: Running) -> list[sse.EventStream]:
    return [
        end.__self__
        for end in running.registry.auth._staying
        if isinstance(getattr(end, "__self__", None), sse.EventStream)
    ]


async def stalled(running: Running, query: str = "") -> socket.socket:
    """Open a stream that reads nothing, on a connection with small system buffers."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, ("127.0.0.1", running.port))
    lines = [f"GET /projects/web/events/stream{query} HTTP/1.1", "Host: x", f"Authorization: Bearer {running.token}"]
    await loop.sock_sendall(raw, "\r\n".join([*lines, "", ""]).encode())
    return raw
