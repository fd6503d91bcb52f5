"""Replay for programs without a cache: the changes after a position, exactly those, or a clear refusal."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Running, farewell, hello, make_data, serving
from websockets.asyncio.client import ClientConnection

from lattice_remote.protocol.messages import (
    Position,
    Replay,
    Replayed,
    Reply,
    Run,
    ServerFrame,
    Welcome,
    decode_server_frame,
    encode,
)
from lattice_remote.server.journal.ids import ChangeIds
from lattice_remote.server.project.connection import replay
from lattice_remote.server.transport.websocket import payload_of


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_data(tmp_path / "data")
    async with serving(data, token) as server:
        yield server


async def received(socket: ClientConnection) -> ServerFrame:
    async with asyncio.timeout(10):
        message = await socket.recv()
    assert isinstance(message, bytes)
    return decode_server_frame(message)


async def write(running: Running, count: int) -> None:
    async with running.connected() as socket:
        await socket.send(hello(follow=False))
        assert isinstance(await received(socket), Welcome)
        for n in range(count):
            await socket.send(encode(Run(secrets.token_hex(16), ["put", "a", str(n)])))
            assert isinstance(await received(socket), Reply)


async def ask(socket: ClientConnection, epoch: str = "", seq: int | None = None, mark: bytes = b"") -> Replayed:
    id_ = secrets.token_hex(16)
    await socket.send(encode(Replay(id_, epoch, seq, mark)))
    answer = await received(socket)
    assert isinstance(answer, Replayed) and answer.id == id_
    return answer


async def greeted(socket: ClientConnection) -> Welcome:
    await socket.send(hello(follow=False))
    welcome = await received(socket)
    assert isinstance(welcome, Welcome) and not welcome.resync
    return welcome


async def test_the_changes_after_a_number_as_they_were_sent(running: Running) -> None:
    await write(running, 5)
    history = running.registry.project("web").history
    async with running.connected() as socket:
        epoch = (await greeted(socket)).epoch
        answer = await ask(socket, epoch, 2)
        assert (answer.outcome, answer.epoch, answer.head, answer.oldest) == ("kept", epoch, 5, 1)
        assert (answer.seq, answer.mark) == (2, await mark_of(running, 2))
        kept = [payload_of(frame) for _, frame in await history.changes_after(2)]
        assert [encode(change) for change in answer.changes] == kept
        last = answer.changes[-1]
        assert (await ask(socket, epoch, last.seq, last.mark)).changes == []


@pytest.mark.parametrize("asked", [(), ("", 2)])
async def test_at_the_head_there_is_nothing_but_the_position(running: Running, asked: tuple[str, int]) -> None:
    await write(running, 2)
    async with running.connected() as socket:
        epoch = (await greeted(socket)).epoch
        answer = await ask(socket, *asked)
    expected = Replayed(answer.id, "kept", epoch, 2, 1, 2, await mark_of(running, 2))
    assert answer == expected


async def test_many_changes_come_in_pieces_of_a_mebibyte(running: Running) -> None:
    async with running.connected() as socket:
        await socket.send(hello(follow=False))
        await received(socket)
        for size in (400_000, 400_000, 400_000, 2_000_000, 10):
            await socket.send(encode(Run(secrets.token_hex(16), ["put", "a", "x" * size])))
            assert isinstance(await received(socket), Reply)
        pieces, at = [], Position("", 0, b"")
        while changes := (await ask(socket, at.epoch, at.seq, at.mark)).changes:
            pieces.append([change.seq for change in changes])
            at = Position(running.registry.project("web").history.epoch, changes[-1].seq, changes[-1].mark)
    assert pieces == [[1, 2, 3], [4], [5]]


async def test_a_client_with_a_cache_may_ask_too(running: Running) -> None:
    await write(running, 3)
    async with running.connected() as socket:
        await socket.send(hello())
        await received(socket)
        assert [change.seq for change in (await ask(socket, "", 1)).changes] == [2, 3]


async def mark_of(running: Running, seq: int) -> bytes:
    mark = await running.registry.project("web").history.mark_at(seq)
    assert mark is not None
    return mark


def genuine(running: Running, seq: int) -> bytes:
    """Return a mark as the project would have given it to another change ``seq`` before it was rolled back."""
    project = running.registry.project("web")
    return ChangeIds(project.paths.journal).make(project.history.epoch, seq)


@pytest.mark.parametrize("seq", [2, 9])
async def test_a_made_up_position_proves_nothing(running: Running, seq: int) -> None:
    """I7: a token holder must not be able to end an epoch with any made-up number and mark."""
    await write(running, 2)
    history = running.registry.project("web").history
    epoch = history.epoch
    for mark in (b"another!", bytes(16), (await mark_of(running, 1)), b"x" * 32):
        async with running.connected() as socket:
            await greeted(socket)
            assert (await ask(socket, epoch, seq, mark)).outcome == ("ahead" if seq == 9 else "epoch")
        async with running.connected() as socket:
            await socket.send(hello(epoch=epoch, seq=seq, mark=mark))
            welcome = await received(socket)
            assert isinstance(welcome, Welcome) and welcome.resync and welcome.epoch == epoch
    assert history.epoch == epoch


@pytest.mark.parametrize("seq", [1, 2, 9])
async def test_a_genuine_position_that_the_server_lacks_proves_a_rollback(running: Running, seq: int) -> None:
    await write(running, 2)
    history = running.registry.project("web").history
    epoch, mark = history.epoch, genuine(running, seq)
    async with running.connected() as socket:
        await socket.send(hello(epoch=epoch, seq=seq, mark=mark))
        welcome = await received(socket)
        assert isinstance(welcome, Welcome) and welcome.resync and welcome.epoch == history.epoch != epoch
    renewed = history.epoch
    for _ in range(2):  # the same proof again proves nothing of this epoch
        async with running.connected() as socket:
            await socket.send(hello(epoch=epoch, seq=seq, mark=mark))
            assert isinstance(await received(socket), Welcome)
    assert history.epoch == renewed


async def test_a_number_alone_proves_nothing_and_a_mark_does(running: Running) -> None:
    """I7: a number can be guessed; a change's mark is known only to a client that received it."""
    await write(running, 2)
    history = running.registry.project("web").history
    epoch = history.epoch
    async with running.connected() as socket:
        await greeted(socket)
        assert (await ask(socket, epoch, 9)).outcome == "ahead"
        assert (await ask(socket, "other", 1)).outcome == "epoch"
        assert (await ask(socket, epoch, 1)).outcome == "kept"
    assert history.epoch == epoch
    async with running.connected() as socket:
        await greeted(socket)
        await socket.send(encode(Replay("0" * 32, epoch, 9, genuine(running, 9))))
        bye, _ = await farewell(socket)
    assert bye is not None and bye.code == "REMOTE_BUSY" and history.epoch != epoch


async def test_versions_before_the_retention_are_reported(running: Running) -> None:
    await write(running, 4)
    history = running.registry.project("web").history
    history.oldest = 3
    async with running.connected() as socket:
        epoch = (await greeted(socket)).epoch
        answer = await ask(socket, epoch, 1)
        assert answer == Replayed(answer.id, "expired", epoch, 4, 3, 1)
        assert [change.seq for change in (await ask(socket, epoch, 2)).changes] == [3, 4]


async def test_a_history_that_changes_during_the_reading_is_another_epoch(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7: changes of one epoch are never sent under the name of another."""
    await write(running, 2)
    project = running.registry.project("web")
    read = project.history.changes_after

    async def reading(seq: int) -> list[tuple[int, bytes]]:
        found = await read(seq)
        await project.rollback_proved(project.history.epoch, "a test says so")
        return found

    monkeypatch.setattr(project.history, "changes_after", reading)
    before = project.history.epoch
    answer = await replay(Replay("0" * 32, before, 1), project)
    assert (answer.outcome, answer.changes, answer.epoch) == ("epoch", [], project.history.epoch)
    assert answer.epoch != before
