"""The changes as they arrive: none left out, none twice, in order, whatever happens to the connection in between."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from client_kit import until
from fake_server import TOKEN, FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client import trusted_servers
from lattice_remote.client.config import Remote
from lattice_remote.client.connection import change_stream as streams
from lattice_remote.client.connection.change_stream import (
    Arrived,
    ChangeStream,
    Connected,
    Ended,
    EpochStarted,
    Gone,
    Item,
    Lost,
)
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import ClientFrame, Follow, Hello
from lattice_remote.protocol.operations import PutFile


class Reader:
    """Takes from a stream in this test's own loop."""

    def __init__(self, stream: ChangeStream) -> None:
        self.stream = stream
        self.items: list[Item] = []

    @property
    def seqs(self) -> list[int]:
        return [item.change.seq for item in self.items if isinstance(item, Arrived)]

    def take(self) -> None:
        while (item := self.stream.take(0.001)) is not None:
            self.items.append(item)

    async def until(self, kind: type, count: int = 1) -> Item:
        found: list[Item] = []

        def enough() -> bool:
            self.take()
            found[:] = [item for item in self.items if isinstance(item, kind)]
            return len(found) >= count

        await until(enough, 30)
        return found[-1]


@pytest.fixture
async def reader(server: FakeServer) -> AsyncIterator[Reader]:
    for opened in reading(server):
        yield opened


def reading(server: FakeServer, **where: object) -> Iterator[Reader]:
    trusted_servers.record(trusted_servers.name(server.url))
    stream = ChangeStream(Remote("origin", server.url, "web"), TOKEN, named=None, **where)  # type: ignore[arg-type]
    stream.start()
    yield Reader(stream)
    stream.close()


async def test_it_begins_with_the_next_change_and_keeps_no_copy(server: FakeServer, reader: Reader) -> None:
    server.put("a", b"1")
    assert await reader.until(Connected) == Connected(Position("epoch-1", 1, b""), 1)
    server.put("a", b"2")
    server.put("a", b"3")
    await reader.until(Arrived, 2)
    assert reader.seqs == [2, 3]
    assert {type(frame) for frame in server.frames} == {Hello, Follow}


async def test_after_every_cut_it_goes_on_where_it_was(server: FakeServer, reader: Reader) -> None:
    await reader.until(Connected)
    for n in range(4):
        server.put("a", str(n).encode())
        await reader.until(Arrived, 2 * n + 1)
        server.cut()
        server.put("b", str(n).encode())
        await reader.until(Arrived, 2 * n + 2)
    assert reader.seqs == list(range(1, 9))
    asked = [frame for frame in server.frames if isinstance(frame, Follow)]
    assert [frame.seq for frame in asked[1:]] == [1, 3, 5, 7] and all(frame.mark for frame in asked[1:])


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({"since": 9}, "there is no change 9 yet, the last is 4: resume with --since 4"),
        (
            {"since": 0},
            "the changes after 0 are not kept any more; the oldest that is kept is 3: resume with --since 2",
        ),
        ({"since": Position("older", 3, b"m")}, "is not in the project's history, which is of epoch epoch-1 now"),
    ],
)
async def test_what_is_not_kept_is_said_and_never_left_out_silently(
    server: FakeServer, where: dict[str, object], why: str
) -> None:
    for n in range(4):
        server.put("a", str(n).encode())
    server.oldest = 3
    for reader in reading(server, **where):
        ended = await reader.until(Ended)
        assert isinstance(ended, Ended) and isinstance(ended.error, Gone) and why in ended.error.message
        assert not reader.seqs


async def test_what_has_expired_while_it_was_away_ends_it(server: FakeServer, reader: Reader) -> None:
    await reader.until(Connected)
    server.put("a", b"1")
    await reader.until(Arrived)
    await server.stop()
    await reader.until(Lost)
    for n in range(5):
        server.numbered(PutFile("a", str(n).encode()))
    server.oldest = 4
    await server.start()
    ended = await reader.until(Ended)
    assert isinstance(ended, Ended) and "after 1 are not kept" in ended.error.message and reader.seqs == [1]


async def test_a_new_epoch_is_said_and_followed_from_its_beginning(server: FakeServer, reader: Reader) -> None:
    """I7."""
    await reader.until(Connected)
    server.put("a", b"1")
    await reader.until(Arrived)
    server.epoch, server.changes = "epoch-2", []
    server.put("a", b"2")
    server.cut()
    await reader.until(Arrived, 2)
    kinds = [type(item) for item in reader.items if not isinstance(item, Lost)]
    assert kinds == [Connected, Arrived, EpochStarted, Connected, Arrived]
    assert [item.epoch for item in reader.items if isinstance(item, Arrived)] == ["epoch-1", "epoch-2"]


async def test_a_history_that_begins_anew_between_two_frames_ends_nothing(server: FakeServer, reader: Reader) -> None:
    """I7: it was welcomed in one epoch, and asks for changes in the next."""
    await reader.until(Connected)
    server.put("a", b"1")
    await reader.until(Arrived)

    async def begin_anew(_connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Follow) and server.epoch == "epoch-1":
            server.epoch, server.changes = "epoch-2", []
        return False

    server.misbehave = begin_anew  # type: ignore[assignment]
    server.cut()
    await reader.until(EpochStarted)
    server.put("a", b"2")
    await reader.until(Arrived, 2)
    assert not [item for item in reader.items if isinstance(item, Ended)]


async def test_who_takes_none_holds_no_connection_and_misses_nothing(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10."""
    monkeypatch.setattr(streams, "MAX_WAITING", 20)
    for reader in reading(server):
        await reader.until(Connected)
        for n in range(100):
            server.put("a", str(n).encode())
        await until(lambda: server.greetings >= 1 and not server.connections)
        await asyncio.to_thread(lambda: None)
        assert reader.stream._waiting <= 22, "no more than it may keep"
        await reader.until(Arrived, 100)
        assert reader.seqs == list(range(1, 101))
        assert any(
            "faster than they are processed" in item.error.message for item in reader.items if isinstance(item, Lost)
        )


async def test_a_refused_token_ends_it(server: FakeServer) -> None:
    server.tokens.clear()
    for reader in reading(server):
        ended = await reader.until(Ended)
        assert isinstance(ended, Ended) and ended.error.code == "REMOTE_UNAUTHORIZED"


async def test_a_change_out_of_turn_is_a_violation(server: FakeServer, reader: Reader) -> None:
    await reader.until(Connected)
    server.numbered(PutFile("a", b"1"))
    server.put("a", b"2")
    lost = await reader.until(Lost)
    assert isinstance(lost, Lost) and lost.error.code == "REMOTE_PROTOCOL"
    await reader.until(Arrived, 2)
    assert reader.seqs == [1, 2]
