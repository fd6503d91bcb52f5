"""Who looks on without a copy: the changes after a number, exactly those, or a clear no."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Running, farewell, hello, make_data, serving
from websockets.asyncio.client import ClientConnection

from lattice_remote.protocol.codec import decode_server_frame, encode
from lattice_remote.protocol.messages import Change, Follow, Followed, Reply, Run, ServerFrame, Welcome
from lattice_remote.server.journal.segment import ChangeIds


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


async def ask(socket: ClientConnection, follow: Follow) -> Followed:
    await socket.send(encode(follow))
    answer = await received(socket)
    assert isinstance(answer, Followed)
    return answer


async def greeted(socket: ClientConnection) -> Welcome:
    await socket.send(hello(follow=False))
    welcome = await received(socket)
    assert isinstance(welcome, Welcome) and not welcome.resync
    return welcome


async def test_the_changes_after_a_number_and_then_every_new_one(running: Running) -> None:
    await write(running, 5)
    async with running.connected() as socket:
        epoch = (await greeted(socket)).epoch
        assert await ask(socket, Follow(epoch, 2)) == Followed(2, "following", epoch, 5, 1, await mark_of(running, 2))
        await write(running, 3)
        changes = [await received(socket) for _ in range(6)]
    assert [change.seq for change in changes if isinstance(change, Change)] == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("asked", [Follow(), Follow("", 2)])
async def test_from_now_on_and_at_the_head_nothing_comes_before_the_next(running: Running, asked: Follow) -> None:
    await write(running, 2)
    async with running.connected() as socket:
        await greeted(socket)
        answer = await ask(socket, asked)
        assert (answer.outcome, answer.seq, answer.head) == ("following", 2, 2)
        await write(running, 1)
        change = await received(socket)
        assert isinstance(change, Change) and change.seq == 3


async def mark_of(running: Running, seq: int) -> bytes:
    mark = await running.hub.project("web").history.mark_at(seq)
    assert mark is not None
    return mark


def genuine(running: Running, seq: int) -> bytes:
    """Return a mark as the project would have given it to another change ``seq`` before it was rolled back."""
    project = running.hub.project("web")
    return ChangeIds(project.paths.journal).make(project.history.epoch, seq)


@pytest.mark.parametrize("seq", [2, 9])
async def test_a_made_up_position_proves_nothing(running: Running, seq: int) -> None:
    """I7: a token holder must not be able to end an epoch, whichever number and mark it makes up."""
    await write(running, 2)
    history = running.hub.project("web").history
    epoch = history.epoch
    for mark in (b"another!", bytes(16), (await mark_of(running, 1)), b"x" * 32):
        async with running.connected() as socket:
            await greeted(socket)
            assert (await ask(socket, Follow(epoch, seq, mark))).outcome == ("ahead" if seq == 9 else "epoch")
        async with running.connected() as socket:
            await socket.send(hello(epoch=epoch, seq=seq, mark=mark))
            welcome = await received(socket)
            assert isinstance(welcome, Welcome) and welcome.resync and welcome.epoch == epoch
    assert history.epoch == epoch


@pytest.mark.parametrize("seq", [1, 2, 9])
async def test_a_genuine_position_that_the_server_lacks_proves_a_rollback(running: Running, seq: int) -> None:
    await write(running, 2)
    history = running.hub.project("web").history
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
    """I7: anybody may guess a number; who has a change's mark has seen it."""
    await write(running, 2)
    history = running.hub.project("web").history
    epoch = history.epoch
    async with running.connected() as socket:
        await greeted(socket)
        assert (await ask(socket, Follow(epoch, 9))).outcome == "ahead"
        assert (await ask(socket, Follow("other", 1))).outcome == "epoch"
        assert (await ask(socket, Follow(epoch, 1))).outcome == "following"
    assert history.epoch == epoch
    async with running.connected() as socket:
        await greeted(socket)
        await socket.send(encode(Follow(epoch, 9, genuine(running, 9))))
        bye, _ = await farewell(socket)
    assert bye is not None and bye.code == "REMOTE_BUSY" and history.epoch != epoch


async def test_what_is_not_kept_is_said(running: Running) -> None:
    await write(running, 4)
    history = running.hub.project("web").history
    history.oldest = 3
    async with running.connected() as socket:
        epoch = (await greeted(socket)).epoch
        assert await ask(socket, Follow(epoch, 1)) == Followed(1, "expired", epoch, 4, 3, await mark_of(running, 1))
        assert (await ask(socket, Follow(epoch, 2))).outcome == "following"


@pytest.mark.parametrize("case", ["twice", "with a copy"])
async def test_follow_comes_once_and_from_those_who_may(running: Running, case: str) -> None:
    async with running.connected() as socket:
        await socket.send(hello(follow=case == "with a copy"))
        await received(socket)
        await socket.send(encode(Follow()))
        if case == "twice":
            await received(socket)
            await socket.send(encode(Follow()))
        bye, code = await farewell(socket)
    assert bye is not None and (bye.code, code) == ("REMOTE_PROTOCOL", 1002)
