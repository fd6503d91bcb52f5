"""Negotiation of capabilities, and clients of other versions."""

import logging
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from harness import Copy, Running, farewell, hello, make_data, serving, tree_of
from lattice.core.config import default_config, serialize_config
from lattice.storage.fs import atomic_write, ensure_lattice_dirs
from websockets.asyncio.client import ClientConnection

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Call,
    Change,
    Log,
    LogPage,
    Part,
    Parts,
    Put,
    Refused,
    Reply,
    Returned,
    Welcome,
    decode_server_frame,
    encode,
)
from lattice_remote.protocol.operations import AppendBytes, MergeJson, MoveFile, PutFile, digest_of
from lattice_remote.server.project import connection
from lattice_remote.server.project.worker_process import WORKER_COMMAND

ANA = ("--actor", "human:ana")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_data(tmp_path / "data")
    ensure_lattice_dirs(data.project("web").root)
    config = {**default_config(), "project_code": "LAT"}
    atomic_write(data.project("web").lattice / "config.json", serialize_config(config))
    async with serving(data, token, worker=WORKER_COMMAND) as server:
        yield server


async def work(copy: Copy) -> None:
    """Run commands whose changes hold every kind of operation."""
    long = "x" * 6000
    for argv in (
        ("create", "One", "--description", long),
        ("comment", "LAT-1", long),
        ("status", "LAT-1", "in_planning"),
        ("comment", "LAT-1", "more"),
        ("create", "Two"),
        ("archive", "LAT-1"),
    ):
        reply = await copy.run(*argv, *ANA)
        assert isinstance(reply, Reply) and reply.exit_code == 0, reply


async def test_every_client_gets_the_same_bytes_live_and_on_replay(running: Running) -> None:
    """S3: a change has one encoding, independent of the client's capabilities."""

    async def changes(socket: ClientConnection, head: int) -> list[bytes]:
        """Return the changes that arrive, as sent, up to ``head``."""
        found: list[bytes] = []
        while not found or decode(found[-1]).seq < head:
            data = await socket.recv()
            assert isinstance(data, bytes)
            if isinstance(decode_server_frame(data), Change):
                found.append(data)
        return found

    def decode(data: bytes) -> Change:
        return msgspec.msgpack.decode(data, type=Change)

    copy = Copy()
    async with running.connected() as own, running.connected() as few, running.connected() as many:
        await few.send(hello(capabilities=[]))
        await many.send(hello(capabilities=[*CAPABILITIES, "merge", "a-later-one"]))
        welcome = decode_server_frame(await few.recv())
        assert isinstance(welcome, Welcome) and welcome.resync and welcome.head == 0
        await copy.greet(own)
        await copy.sync()
        await work(copy)
        live, also = await changes(few, copy.replica.head), await changes(many, copy.replica.head)
    async with running.connected() as socket:
        await socket.send(hello(capabilities=[], epoch=welcome.epoch))
        replayed = await changes(socket, copy.replica.head)
    assert live == also == replayed
    kinds = {type(operation) for data in live for operation in decode(data).ops}
    assert kinds >= {AppendBytes, MergeJson, MoveFile, PutFile}, "the commands write in every way"
    assert copy.tree == tree_of(running.tree)


async def test_files_are_sent_together_only_to_a_client_that_supports_it(running: Running) -> None:
    together, apart = Copy(), Copy()
    async with running.connected() as socket:
        await together.greet(socket)
        await together.sync()
        await work(together)
    fresh = Copy()
    async with running.connected() as one, running.connected() as other:
        await fresh.greet(one)
        await apart.greet(other, capabilities=["call:mcp", "later"])
        await fresh.sync()
        await apart.sync()
    assert [type(frame) for frame in fresh.frames if isinstance(frame, Part | Parts)] == [Parts]
    assert [frame for frame in apart.frames if isinstance(frame, Part)]
    assert not [frame for frame in apart.frames if isinstance(frame, Parts)]
    assert fresh.tree == apart.tree == tree_of(running.tree)


async def test_a_call_of_a_client_that_has_not_named_its_surface_is_refused(running: Running) -> None:
    copy = Copy()
    arguments = b'{"title": "One", "actor": "human:ana"}'
    async with running.connected() as socket:
        await copy.greet(socket, capabilities=[])
        await copy.sync()
        await copy.send(Call("1" * 32, "mcp", "lattice_create", arguments))
        await copy.send(Call("2" * 32, "shell", "ls", b"{}"))
        await copy.send(Call("3" * 32, "commands", "together", b'{"lines": [["list"]]}'))
        await copy.send(Call("4" * 32, "dashboard", "/api/tasks", arguments))
        while len(copy.answers) < 4:
            await copy.pump()
    refused, unknown, internal, answer = (copy.answers[digit * 32] for digit in "1234")
    assert isinstance(refused, Refused) and refused.code == "REMOTE_VERSION" and "call:mcp" in refused.message
    assert isinstance(unknown, Refused) and unknown.code == "REMOTE_UNSUPPORTED"
    assert isinstance(internal, Refused) and internal.code == "REMOTE_UNSUPPORTED", "a surface of the server's own"
    assert isinstance(answer, Returned) and (answer.seq, answer.status) == (1, 201)


async def test_a_base_may_be_named_by_its_digest(running: Running) -> None:
    copy = Copy()
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.sync()
        assert isinstance(await copy.run("create", "One", *ANA), Reply)
        (plan,) = [path for path in copy.tree if path.startswith("plans/")]
        text, outcomes = copy.tree[plan], []
        for digest in (digest_of(text), digest_of(text), bytes(3)):
            id_ = secrets.token_hex(16)
            await copy.send(Put(id_, plan, None, b"# Mine\n", base_digest=digest))
            answer = await copy.answer(id_)
            outcomes.append(answer.code if isinstance(answer, Refused) else answer.outcome)  # type: ignore[union-attr]
        assert outcomes == ["stored", "REMOTE_STALE_BASE", "REMOTE_STALE_BASE"]
        assert (running.tree / plan).read_bytes() == b"# Mine\n"


async def test_a_surface_that_lacks_its_package_is_not_offered(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "is_offered", lambda name: name != "mcp")
    async with running.connected() as socket:
        await socket.send(hello())
        welcome = decode_server_frame(await socket.recv())
    assert isinstance(welcome, Welcome)
    assert set(welcome.capabilities) == set(CAPABILITIES) - {"call:mcp"}


async def test_fields_of_the_future_are_ignored_and_frames_of_the_future_refused(running: Running) -> None:
    async with running.connected() as socket:
        greeting = msgspec.msgpack.decode(hello())
        await socket.send(msgspec.msgpack.encode({**greeting, "colour": "blue", "capabilities": [*CAPABILITIES, "x"]}))
        assert decode_server_frame(await socket.recv()).__class__.__name__ == "Welcome"
        asked = msgspec.msgpack.decode(encode(Log("0" * 32)))
        await socket.send(msgspec.msgpack.encode({**asked, "sort": "oldest"}))
        assert isinstance(decode_server_frame(await socket.recv()), LogPage)
        await socket.send(msgspec.msgpack.encode({"type": "subscribe", "id": "0" * 32}))
        bye, code = await farewell(socket)
    assert bye is not None and (bye.code, code) == ("REMOTE_PROTOCOL", 1002)


async def test_the_log_names_what_a_client_runs_and_which_side_is_older(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lattice_remote.server.project.connection")
    async with running.connected() as socket:
        await socket.send(hello(client_version="99.0\x1b[31m", lattice_version="0.0.1"))
        await socket.recv()
    (line,) = [record.getMessage() for record in caplog.records if "connected at" in record.getMessage()]
    assert line.isprintable() and r"lattice-remote 99.0\x1b[31m (" in line and "upgrade the server" in line
    assert "lattice-tracker 0.0.1 (0.0.1 is older: upgrade the client)" in line


async def test_a_version_that_a_client_does_not_name_is_not_called_older(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lattice_remote.server.project.connection")
    async with running.connected() as socket:
        await socket.send(hello(client_version="99.0", lattice_version=""))
        await socket.recv()
    (line,) = [record.getMessage() for record in caplog.records if "connected at" in record.getMessage()]
    assert "lattice-remote 99.0 (" in line and "lattice-tracker" not in line
