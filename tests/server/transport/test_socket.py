"""One connected client and the server: greeting, catching up, files under load, violations, goodbyes."""

import asyncio
import contextlib
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Copy, Running, farewell, hello, make_data, serving, tree_of, until
from websockets.asyncio.client import ClientConnection

from lattice_remote.protocol.messages import Change, Entries, Reply, Run, Welcome, decode_server_frame, encode
from lattice_remote.server.journal.ids import ChangeIds
from lattice_remote.server.tokens import TokenFile


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with serving(*make_data(tmp_path / "data")) as server:
        yield server


# --- greeting and catching up ---


async def test_a_new_copy_is_filled_and_follows(running: Running) -> None:
    copy = Copy()
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
        reply = await copy.run("put", "a/b", "text")
        assert isinstance(reply, Reply)
        assert copy.tree == tree_of(running.tree)
        assert copy.replica.position.seq == reply.seq == 1


async def test_a_returning_cache_gets_only_the_changes_that_it_missed(running: Running) -> None:
    copy = Copy()
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
        await copy.run("put", "a", "0")
    async with running.connected() as client:
        other = Copy()
        await other.greet(client)
        for i in range(50):
            await other.run("put", "a", str(i))
    copy.replica.disconnected()
    copy.frames.clear()
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
    kinds = [type(frame) for frame in copy.frames]
    assert kinds == [Welcome, *[Change] * 50]
    assert copy.tree == tree_of(running.tree)


async def write_once(client: ClientConnection) -> Copy:
    """Return a cache that follows on this connection and has written the first change."""
    copy = Copy()
    await copy.greet(client)
    await copy.sync()
    await copy.run("put", "a", "0")
    return copy


async def resync_from(running: Running, client: ClientConnection, epoch: str, seq: int) -> Welcome:
    """Greet from a position with a genuine change id that this history lacks; return the welcome."""
    mark = ChangeIds(running.registry.project("web").paths.journal).make(epoch, seq)
    await client.send(hello(epoch=epoch, seq=seq, mark=mark))
    welcome = decode_server_frame(await client.recv())
    assert isinstance(welcome, Welcome)
    assert welcome.resync and welcome.epoch != epoch
    return welcome


async def test_a_client_that_proves_a_rollback_gets_a_new_epoch(running: Running) -> None:
    async with running.connected() as client:
        copy = await write_once(client)
        async with running.connected() as ahead:
            await resync_from(running, ahead, copy.replica.position.epoch, 7)
        bye, code = await farewell(client)
        assert bye is not None
        assert bye.retry_after_s == 0
        assert code == 1012


async def test_another_mark_at_the_same_number_is_a_rollback(running: Running) -> None:
    async with running.connected() as client:
        copy = await write_once(client)
    async with running.connected() as client:
        assert (await resync_from(running, client, copy.replica.position.epoch, 1)).lost


async def test_a_request_id_is_of_one_request_on_every_connection(running: Running) -> None:
    """I6: also while the first is running, and with any reported age."""
    copy, id_ = Copy(), "a" * 32
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
        await client.send(encode(Run(id_, ["put", "a", "0"])))
        await client.send(encode(Run(id_, ["put", "a", "0"], age_s=0.1)))
        await client.send(encode(Run(id_, ["put", "a", "1"])))
        bye, _ = await farewell(client)
        assert bye is not None and bye.code == "REMOTE_PROTOCOL" and "a different request" in bye.reason
    async with running.connected() as client:
        await client.send(hello(follow=False))
        assert isinstance(decode_server_frame(await client.recv()), Welcome)
        await client.send(encode(Run(id_, ["put", "a", "0"], age_s=1.0)))
        assert isinstance(decode_server_frame(await client.recv()), Reply)
        assert (running.tree / "a").read_text() == "0"


async def test_a_writer_that_does_not_follow_gets_answers_only(running: Running) -> None:
    copy = Copy(follow=False)
    async with running.connected() as client:
        await copy.greet(client)
        assert isinstance(await copy.run("put", "a", "x"), Reply)
    assert [type(frame) for frame in copy.frames] == [Welcome, Reply]


async def test_an_answer_waits_for_the_changes_that_its_client_missed(running: Running) -> None:
    copy = Copy()
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
    async with running.connected() as client:
        other = Copy()
        await other.greet(client)
        for i in range(200):
            await other.send(Run(secrets.token_hex(16), ["put", "a", str(i) * 1000]))
        await other.run("noop")
    copy.replica.disconnected()
    async with running.connected() as client:
        id_ = secrets.token_hex(16)
        await client.send(encode(copy.replica.hello(client_version="t", lattice_version="t")))
        await client.send(encode(Run(id_, ["put", "b", "mine"])))
        copy._socket = client
        reply = await copy.answer(id_)
        assert copy.replica.position.seq >= reply.seq  # type: ignore[union-attr]
        numbers = [frame.seq for frame in copy.frames if isinstance(frame, Change | Reply)]
        assert numbers == sorted(numbers)


# --- files ---


async def test_copies_filled_under_load_equal_the_server(running: Running) -> None:
    big = running.tree / "big.bin"
    big.write_bytes(secrets.token_bytes(5_000_000))
    async with running.connected() as client:
        writer = Copy(follow=False)
        await writer.greet(client)

        async def write() -> None:
            for i in range(150):
                await writer.run("slow" if i % 3 == 0 else "put", f"hot{i % 3}", f"{i}" * 500)

        writing = asyncio.create_task(write())
        copies = [Copy() for _ in range(4)]

        async def fill(copy: Copy) -> None:
            async with running.connected() as client:
                await copy.greet(client)
                await copy.sync()
                while not copy.replica.is_current or copy.replica.head < 150:
                    await copy.pump()

        async with asyncio.timeout(30):
            await asyncio.gather(writing, *(fill(copy) for copy in copies))
    for copy in copies:
        assert copy.replica.position.seq == 150
        assert copy.tree == tree_of(running.tree)


async def test_a_manifest_is_of_the_last_change_before_it_however_busy(running: Running) -> None:
    async with running.connected() as client, running.connected() as busy:
        writer, copy = Copy(follow=False), Copy()
        await writer.greet(busy)
        await copy.greet(client)
        await copy.sync()
        ids = [secrets.token_hex(16) for _ in range(100)]
        for id_ in ids:
            await writer.send(Run(id_, ["put", "a", id_]))
        for _ in range(10):
            for effect in copy.replica.compare(repair=False):
                await copy._perform(effect)
            await copy.sync()
        assert sum(isinstance(frame, Entries) for frame in copy.frames) == 11


async def test_an_edit_on_the_server_reaches_its_clients(running: Running) -> None:
    async with running.connected() as client:
        copy = Copy()
        await copy.greet(client)
        await copy.sync()
        (running.tree / "edited").mkdir()
        deadline = time.monotonic() + 60
        while "edited/x" not in copy.tree and time.monotonic() < deadline:
            # The directory itself must be watched before changes in it are seen.
            (running.tree / "edited/x").write_text(str(time.monotonic()))
            try:
                async with asyncio.timeout(0.3):
                    await copy.pump()
            except TimeoutError:
                continue
        assert "edited/x" in copy.tree


# --- slow, disconnected and revoked clients ---


async def upgraded(running: Running) -> socket.socket:
    """Return a WebSocket connection with a small buffer that reads nothing by itself."""
    loop = asyncio.get_running_loop()
    raw = socket.socket()
    raw.setblocking(False)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await loop.sock_connect(raw, ("127.0.0.1", running.port))
    request = (
        "GET /projects/web/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: lattice.v1\r\nAuthorization: Bearer {running.token}\r\n\r\n"
    )
    await loop.sock_sendall(raw, request.encode())
    assert b" 101 " in await loop.sock_recv(raw, 4096)
    return raw


async def stalled(running: Running) -> socket.socket:
    """Return a connection that greets, and then never reads again."""
    raw = await upgraded(running)
    before = len(running.registry._peers)
    await asyncio.get_running_loop().sock_sendall(raw, masked(hello()))
    await until(lambda: sum(peer._live for peer in running.registry._peers) >= before)
    return raw


def masked(payload: bytes) -> bytes:
    head = bytes((0x82, 0x80 | len(payload))) if len(payload) < 126 else struct.pack(">BBH", 0x82, 0xFE, len(payload))
    return head + b"\0\0\0\0" + payload


async def test_answers_that_wait_for_a_client_to_catch_up_are_bounded(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.server.project.connection.MAX_PENDING_BYTES", 5_000)
    async with running.connected() as client:
        copy = Copy()
        await copy.greet(client)
        epoch = copy.replica.welcome.epoch  # type: ignore[union-attr]
        for _ in range(12):
            await copy.run("put", "a", "x" * 500_000)
    await until(lambda: not running.registry._peers)
    raw = await upgraded(running)
    try:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(raw, masked(hello(epoch=epoch)))
        await until(lambda: any(peer._sent for peer in running.registry._peers))
        [peer] = running.registry._peers
        with contextlib.suppress(ConnectionError):
            for _ in range(400):
                await loop.sock_sendall(raw, masked(encode(Run(secrets.token_hex(16), ["noop"]))))
        await until(lambda: not running.registry._peers)
        assert 0 < peer._deferred_bytes <= 5_000
    finally:
        raw.close()


async def test_a_client_that_greets_while_its_project_fails_gets_the_reason(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running.connected() as other, running.connected() as client:
        copy = Copy()
        await copy.greet(other)
        project = running.registry.project("web")

        async def mark_at(seq: int) -> bytes:
            await copy.send(Run(secrets.token_hex(16), ["fail"]))
            await until(lambda: project.failure is not None)
            return b""

        monkeypatch.setattr(project.history, "mark_at", mark_at)
        await client.send(hello(epoch=project.history.epoch))
        bye, _ = await farewell(client)
        assert bye is not None
        assert bye.code == "REMOTE_STORAGE"


async def test_a_stalled_client_delays_no_other_client_and_is_disconnected(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = await stalled(running)
    try:
        [peer] = running.registry._peers
        monkeypatch.setattr(peer._outbox, "_max_bytes", 4_000_000)
        copy = Copy()
        slowest = 0.0
        async with running.connected(max_size=None) as client:
            await copy.greet(client)
            await copy.sync()
            most = 0
            while peer in running.registry._peers:
                before = time.monotonic()
                assert isinstance(await copy.run("put", "a", "x" * 500_000), Reply)
                slowest = max(slowest, time.monotonic() - before)
                most = max(most, peer._outbox.pending_bytes)
                assert copy.replica.position.seq < 100
        assert slowest < 8, "the stalled client is cut after 10 s"
        assert most < 6_000_000
    finally:
        raw.close()


async def test_a_stalled_client_is_cut_by_its_deadline(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = await stalled(running)
    try:
        [peer] = running.registry._peers
        monkeypatch.setattr(peer._outbox, "_deadline_s", 0.5)
        copy = Copy()
        async with running.connected() as client:
            await copy.greet(client)
            for _ in range(12):
                await copy.run("put", "a", "x" * 500_000)
            await until(lambda: peer not in running.registry._peers, 5.0)
            assert isinstance(await copy.run("noop"), Reply)
    finally:
        raw.close()


async def test_stopping_does_not_wait_until_stalled_clients_are_cut(tmp_path: Path) -> None:
    async with serving(*make_data(tmp_path / "data")) as running:
        raws = [await stalled(running) for _ in range(3)]
        async with running.connected() as client:
            copy = Copy()
            await copy.greet(client)
            for _ in range(12):
                await copy.run("put", "a", "x" * 500_000)
            before = time.monotonic()
            running.server.should_exit = True
            bye, code = await farewell(client)
            assert bye is not None
            assert (bye.code, bye.retry_after_s, code) == ("REMOTE_SHUTDOWN", 1.0, 1001)
    assert time.monotonic() - before < 8, "they are cut after 10 s"
    for raw in raws:
        raw.close()


async def test_a_project_made_while_it_runs_can_be_used(running: Running) -> None:
    (running.data.path / "projects/new/.lattice").mkdir(parents=True)
    (running.data.path / "projects/new/journal").mkdir()
    _, text = TokenFile(running.data.tokens).create(projects=["new"], actor="human:ana", act_as=[])
    async with running.connected(text, "new") as client:
        copy = Copy()
        await copy.greet(client)
        assert isinstance(await copy.run("put", "a", "x"), Reply)


async def test_many_writers_at_once_are_all_answered(running: Running) -> None:
    async def write(n: int) -> None:
        async with running.connected() as client:
            copy = Copy()
            await copy.greet(client)
            for i in range(10):
                assert isinstance(await copy.run("put", f"f{n}", str(i)), Reply)
            assert copy.tree[f"f{n}"] == b"9"

    await asyncio.gather(*(write(n) for n in range(32)))
