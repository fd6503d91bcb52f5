"""Older clients against this server: they are sent what they understand, or told whom to upgrade."""

import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import pytest
from harness import Copy, Running, farewell, hello, make_data, serving, tree_of
from lattice.core.config import default_config, serialize_config
from lattice.storage.fs import atomic_write, ensure_lattice_dirs

from lattice_remote.protocol.codec import decode_server_frame, encode
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Call,
    Change,
    Log,
    LogPage,
    Put,
    Refused,
    Reply,
    Returned,
    Stored,
    Welcome,
)
from lattice_remote.protocol.operations import AnnounceFile, AppendBytes, MergeJson, MoveFile, Operation, digest_of
from lattice_remote.server.project import connection
from lattice_remote.server.project.connection import ChangeEncoder, encoder_for
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from lattice_remote.server.transport.send_queue import payload_of, websocket_frame

ANA = ("--actor", "human:ana")
KINDS: dict[type, str] = {AppendBytes: "append", MergeJson: "merge", MoveFile: "move"}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_data(tmp_path / "data")
    ensure_lattice_dirs(data.project("web").root)
    config = {**default_config(), "project_code": "LAT"}
    atomic_write(data.project("web").lattice / "config.json", serialize_config(config))
    async with serving(data, token, worker=WORKER_COMMAND) as server:
        yield server


def named(operations: Iterable[Operation]) -> set[str]:
    """Return the capabilities that operations need."""
    return {KINDS[type(operation)] for operation in operations if type(operation) in KINDS}


def received(copy: Copy) -> set[str]:
    return named(operation for frame in copy.frames if isinstance(frame, Change) for operation in frame.ops)


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


@pytest.mark.parametrize("missing", [("append",), ("merge",), ("move",), ("append", "merge", "move")], ids=" ".join)
async def test_an_older_client_stays_equal_live_and_when_it_catches_up(
    running: Running, missing: tuple[str, ...]
) -> None:
    """I3: what it does not understand it fetches whole."""
    capabilities = [capability for capability in CAPABILITIES if capability not in missing]
    old, away, new = Copy(capabilities=capabilities), Copy(capabilities=capabilities), Copy()
    async with running.connected() as socket:
        await away.greet(socket)
        await away.sync()
    async with running.connected() as one, running.connected() as other:
        await old.greet(one)
        await new.greet(other)
        await new.sync()
        await old.sync()
        await work(old)
        await new.run("comment", "LAT-2", "the end", *ANA)
        while old.replica.position != new.replica.position or not old.replica.is_current:
            await old.pump()
    away.replica.disconnected()
    async with running.connected() as socket:
        await away.greet(socket)
        await away.sync()
    assert received(new) == set(KINDS.values()), "the commands write in every way"
    assert not received(old) & set(missing) and not received(away) & set(missing)
    assert received(old) == set(KINDS.values()) - set(missing), "what it does understand is sent as it is"
    assert old.tree == away.tree == new.tree == tree_of(running.tree)
    assert not any(isinstance(frame, Change) and frame.seq == 0 for frame in away.frames)


def test_a_change_is_translated_once_for_all_clients_that_understand_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """I10: the cost of a change does not grow with the number of older clients."""
    translated: list[bytes] = []
    translate = ChangeEncoder._translated

    def counted(self: ChangeEncoder, frame: bytes) -> bytes:
        translated.append(frame)
        return translate(self, frame)

    monkeypatch.setattr(ChangeEncoder, "_translated", counted)
    clients = [encoder_for(frozenset(CAPABILITIES) - {"append", other}) for other in ("log", "put-text") * 50]
    others = [encoder_for(frozenset(CAPABILITIES) - {"move"}), encoder_for(frozenset(CAPABILITIES))]
    for seq in (1, 2):
        line = AppendBytes("events/task_x.jsonl", 0, bytes(32), b"line\n")
        change = Change(seq, bytes(16), "2030-01-01T00:00:00.000Z", "human:ana", "tok_1", "0" * 32, "comment", [line])
        frame = websocket_frame(encode(change))
        told = {client.encode_change(frame) for client in clients}
        assert len(told) == 1
        [operation] = msgspec.msgpack.decode(payload_of(told.pop()), type=Change).ops
        assert isinstance(operation, AnnounceFile)
        assert [client.encode_change(frame) is frame for client in others] == [True, True]
    assert len(translated) == 4  # two changes, for two dialects that lack something


async def test_a_client_that_can_not_fetch_announced_files_is_told_to_upgrade(running: Running) -> None:
    async with running.connected() as socket:
        await socket.send(hello(capabilities=["append", "merge", "move"]))
        bye, code = await farewell(socket)
    assert bye is not None and (bye.code, bye.retry_after_s, code) == ("REMOTE_VERSION", None, 1008)
    assert bye.reason.endswith("upgrade the client")


async def test_a_client_that_only_writes_needs_no_operations(running: Running) -> None:
    copy = Copy(follow=False, capabilities=[])
    async with running.connected() as socket:
        await copy.greet(socket)
        reply = await copy.run("create", "One", *ANA)
        assert isinstance(reply, Reply) and reply.exit_code == 0


@pytest.mark.parametrize("missing", ["put-text", "log"])
async def test_a_request_whose_answer_it_did_not_name_is_refused(running: Running, missing: str) -> None:
    copy = Copy(capabilities=[capability for capability in CAPABILITIES if capability != missing])
    plan = f"plans/task_{'0' * 26}.md"
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.sync()
        await copy.send(Put(secrets.token_hex(16), plan, None, b"# Plan\n"))
        await copy.send(Log(secrets.token_hex(16)))
        while len(copy.answers) < 2:
            await copy.pump()
    refused = [answer for answer in copy.answers.values() if isinstance(answer, Refused)]
    assert [answer.code for answer in refused] == ["REMOTE_VERSION"]
    assert missing in refused[0].message and "upgrade the client" in refused[0].message
    others = {type(answer) for answer in copy.answers.values()} - {Refused}
    assert others == {LogPage if missing == "put-text" else Stored}


async def test_a_call_of_a_client_that_has_not_named_its_surface_is_refused(running: Running) -> None:
    copy = Copy(capabilities=[capability for capability in CAPABILITIES if capability != "call:mcp"])
    arguments = b'{"title": "One", "actor": "human:ana"}'
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.sync()
        await copy.send(Call("1" * 32, "mcp", "lattice_create", arguments))
        await copy.send(Call("2" * 32, "shell", "ls", b"{}"))
        await copy.send(Call("3" * 32, "dashboard", "/api/tasks", arguments))
        while len(copy.answers) < 3:
            await copy.pump()
    refused, unknown, answer = (copy.answers[digit * 32] for digit in "123")
    assert isinstance(refused, Refused) and refused.code == "REMOTE_VERSION" and "call:mcp" in refused.message
    assert isinstance(unknown, Refused) and unknown.code == "REMOTE_VERSION"
    assert isinstance(answer, Returned) and (answer.seq, answer.status) == (1, 201)


async def test_a_base_may_be_named_by_its_digest_by_who_names_the_capability(running: Running) -> None:
    copy, old = Copy(), Copy(capabilities=[capability for capability in CAPABILITIES if capability != "put-base"])
    async with running.connected() as socket, running.connected() as other:
        await copy.greet(socket)
        await copy.sync()
        await old.greet(other)
        assert isinstance(await copy.run("create", "One", *ANA), Reply)
        (plan,) = [path for path in copy.tree if path.startswith("plans/")]
        text, outcomes = copy.tree[plan], []
        for sender, digest in (
            (copy, digest_of(text)),
            (copy, digest_of(text)),
            (copy, bytes(3)),
            (old, digest_of(text)),
        ):
            id_ = secrets.token_hex(16)
            await sender.send(Put(id_, plan, None, b"# Mine\n", base_digest=digest))
            answer = await sender.answer(id_)
            outcomes.append(answer.code if isinstance(answer, Refused) else answer.outcome)  # type: ignore[union-attr]
        assert outcomes == ["stored", "REMOTE_STALE_BASE", "REMOTE_STALE_BASE", "REMOTE_VERSION"]
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
