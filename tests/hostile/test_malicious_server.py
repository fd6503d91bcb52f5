"""A malicious server: it cannot write outside the cache, run anything, or exhaust the client's machine (I9).

The user gets one line of error, and the client does not retry in a loop.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from client_fixtures import directory, home, server, service
from client_kit import PLAN, ask, make_cache, ready, run, tree, until
from fake_server import TOKEN, FakeServer
from raw_server import RawServer, upgraded
from websockets.asyncio.server import ServerConnection

from faultproxy import FaultProxy
from lattice_remote.client import trusted_servers
from lattice_remote.client.agent.service import Service
from lattice_remote.client.connection import dial
from lattice_remote.errors import ConnectionFailed, HostilePath, Rejected, RemoteError
from lattice_remote.protocol.messages import (
    Bye,
    Change,
    ClientFrame,
    Download,
    Downloaded,
    Entries,
    Entry,
    Fetch,
    Hello,
    Limits,
    Manifest,
    Part,
    Put,
    Refused,
    Reply,
    Run,
    ServerFrame,
    Stored,
    decode_server_frame,
    encode,
)
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    PutFile,
    digest_of,
)

__all__ = ["directory", "home", "server", "service"]

ID = "0" * 32
ESCAPES = "\x1b]0;owned\x07\x1b[2Jred\r\nsecond line\x9b31m\u202egpj"
LATTICE = [sys.executable, "-c", "import sys; from lattice.cli.main import cli; sys.argv[0] = 'lattice'; cli()"]


@pytest.fixture(autouse=True)
def without_agent(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", "off")


def outside(directory: Path) -> dict[str, bytes]:
    """Return every file around a cache that a server could want to write, without following symlinks."""
    root = directory.parent.parent
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if directory not in path.parents and path.is_file() and not path.is_symlink() and path.name[0] != "."
    }


def bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def trouble(service: Service) -> RemoteError:
    error = service._replicator.trouble or service._connection.error
    assert error is not None
    assert error.message.isprintable()
    return error


async def attempts_stay_few(service: Service, server: FakeServer) -> None:
    """Require that the client backs off: it spends little of the following seconds on connections."""
    before = len(server.requests)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await asyncio.Event().wait()
    assert len(server.requests) - before <= 8


# --- paths ---

HOSTILE = [
    "../outside",
    "tasks/../../outside",
    "/etc/cron.d/x",
    "//server/share",
    "C:\\x",
    "C:x",
    "tasks\\..\\..\\x",
    "tasks/x\0.json",
    "tasks/\n",
    "tasks/\x1b[2J",
    "tasks/\x9b31m",
    "tasks/\u202egnp.exe",
    "rem\u200cote.json",
    "remote\ufeff.json",
    "\u200d.git/config",
    ".git/hooks/post-checkout",
    ".gitignore",
    ".remote/base/plans/x.md",
    ".remote/x",
    "tasks/.hidden",
    "remote.json",
    "Remote.JSON",
    "remote.j\u017fon",
    "cache_state.json",
    "locks/x",
    "LOCKS/x",
    "plans/x.md.x",
    "notes/x",
    "",
    "tasks//x",
    "tasks/",
    "./x",
    "a/" * 9 + "x",
    "tasks/" + "x" * 256,
    "tasks/" + "\u00fc" * 128,
    "/".join(["x" * 200] * 3),
]


def frames_with(path: str) -> Iterator[ServerFrame]:
    """Return every frame in which a server can name a path."""
    digest = b"d" * 32
    operations = [
        PutFile(path, b"evil"),
        AppendBytes(path, 0, digest, b"evil"),
        MergeJson(path, b"{}", digest),
        MoveFile(path, "tasks/x.json", digest),
        MoveFile("tasks/x.json", path, digest),
        DeleteFile(path),
        AnnounceFile(path, 1, digest),
    ]
    for operation in operations:
        yield Change(1, b"m" * 16, "", "x", "t", "edit", "", [operation])
    yield Entries(0, b"", [Entry(path, 1, digest)], last=True)
    yield Part(path, 0, 4, digest_of(b"evil"), 0, b"evil")


@pytest.mark.parametrize("path", HOSTILE, ids=repr)
def test_no_frame_can_name_a_path_outside_the_tree(path: str) -> None:
    for frame in frames_with(path):
        with pytest.raises((HostilePath, RemoteError)) as error:
            decode_server_frame(encode(frame))
        assert error.value.code == "REMOTE_PROTOCOL" and error.value.message.isprintable()


@pytest.mark.parametrize("path", ["../outside", "/tmp/x", "remote.json", ".git/config", "rem\u200cote.json"])
async def test_a_path_outside_the_tree_ends_the_connection_and_writes_nothing(
    server: FakeServer, service: Service, directory: Path, path: str
) -> None:
    await ask(service, "ready")
    before, inside = outside(directory), tree(directory)
    greeted = server.greetings

    async def at_once(connection: ServerConnection, frame: ClientFrame) -> bool:
        if server.greetings > greeted:
            await connection.send(encode(Change(1, b"m" * 16, "", "x", "t", "edit", "", [PutFile(path, b"evil")])))
        return False

    server.misbehave = at_once  # type: ignore[assignment]
    server.broadcast(Change(1, b"m" * 16, "", "x", "t", "edit", "", [PutFile(path, b"evil")]))
    await until(lambda: service._connection.error is not None)
    assert trouble(service).code == "REMOTE_PROTOCOL"
    assert outside(directory) == before and tree(directory) == inside
    await attempts_stay_few(service, server)
    assert outside(directory) == before and tree(directory) == inside


# --- obstacles in the cache ---


@pytest.mark.parametrize(
    "place", ["tasks", ".remote", ".remote/tmp", ".remote/base", ".remote/base/plans", "artifacts", "artifacts/payload"]
)
async def test_a_symlink_that_replaces_a_directory_is_reported_and_not_followed(
    server: FakeServer, directory: Path, tmp_path: Path, place: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    server.files |= {"artifacts/payload/x": b"x" * 200, PLAN: b"# Plan\n"}
    link_to(victim, directory / place)
    message = await _message_of(directory)
    assert "in the way" in message and place in message
    assert no_files(victim)


async def _message_of(directory: Path) -> str:
    """Return the error message of a command that opens the cache."""
    try:
        service = Service(str(directory))
    except RemoteError as error:
        return error.message
    service.start(TOKEN)
    answer = await ask(service, "ready")
    await service.close()
    return str(answer["message"])


def link_to(victim: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(victim)


def no_files(victim: Path) -> bool:
    return list(victim.iterdir()) == []


@pytest.mark.parametrize("name", [".remote/lock", ".gitignore", "config.json", "cache_state.json"])
async def test_a_symlink_that_replaces_a_file_never_reaches_its_target(
    server: FakeServer, directory: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "authorized_keys"
    victim.write_bytes(b"precious")
    link_to(victim, directory / name)
    await _message_of(directory)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["config.json", "tasks/task_1.json", PLAN, "cache_state.json"])
async def test_a_pipe_among_the_files_blocks_no_command(server: FakeServer, directory: Path, name: str) -> None:
    server.files[PLAN] = b"# Plan\n"
    (directory / name).parent.mkdir(exist_ok=True)
    os.mkfifo(directory / name)
    async with asyncio.timeout(10):
        service = Service(str(directory)) if name != "cache_state.json" else None
        if service is None:
            with pytest.raises(RemoteError, match="in the way"):
                Service(str(directory))
            return
        service.start(TOKEN)
        assert (await ask(service, "ready"))["current"]
        assert (await ask(service, "verify"))["missing"] == ()
        await service.close()
    assert tree(directory) == server.files


async def test_directories_that_turn_into_symlinks_during_a_write_are_not_followed(
    server: FakeServer, service: Service, directory: Path, tmp_path: Path
) -> None:
    await ask(service, "ready")
    victim = tmp_path / "victim"
    victim.mkdir()
    over = threading.Event()
    swapper = threading.Thread(target=swap, args=(directory / "resources", victim, over))
    swapper.start()
    try:
        for n in range(300):
            server.put(f"resources/r{n}/resource.json", b"{}")
            await asyncio.sleep(0.002)
    finally:
        over.set()
        swapper.join()
    assert no_files(victim)
    await ready(service)  # the last swap may still make an attempt fail
    await ask(service, "sync")
    assert tree(directory) == server.files


def swap(place: Path, victim: Path, over: threading.Event) -> None:
    """Replace a directory with a symlink and restore it, repeatedly, until it is ``over``."""
    aside = place.with_name(".aside")
    while not over.is_set():
        with contextlib.suppress(OSError):  # it was created again in that moment
            place.rename(aside)
            place.symlink_to(victim)
            time.sleep(0.0005)
            place.unlink()
        if aside.exists() and not place.exists():
            with contextlib.suppress(OSError):
                aside.rename(place)
        shutil.rmtree(aside, ignore_errors=True)
        time.sleep(0.0005)


async def test_a_file_with_a_second_hard_link_is_not_written_to(
    server: FakeServer, service: Service, directory: Path, tmp_path: Path
) -> None:
    server.files["events/x.jsonl"] = b"one\n"
    await ask(service, "ready")
    os.link(directory / "events/x.jsonl", tmp_path / "backup.jsonl")
    server.append("events/x.jsonl", b"two\n")
    await until(lambda: (directory / "events/x.jsonl").read_bytes() == b"one\ntwo\n")
    assert (tmp_path / "backup.jsonl").read_bytes() == b"one\n"


# --- sizes and endless streams ---


def allow_one_mib(server: FakeServer) -> None:
    trusted_servers.record(trusted_servers.name(server.url, max_cache_mib=1))


async def test_a_huge_announcement_is_refused_before_memory_is_allocated(
    server: FakeServer, service: Service, directory: Path
) -> None:
    async def endless(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Fetch):
            for offset in itertools.count(0, 1 << 16):
                await connection.send(
                    encode(Part(frame.paths[0], server.seq, 1 << 60, b"d" * 32, offset, bytes(1 << 16)))
                )
        return False

    await ask(service, "ready")
    server.misbehave = endless  # type: ignore[assignment]
    server.broadcast(server.numbered(AnnounceFile("events/huge.jsonl", 1 << 60, b"d" * 32)))
    await until(lambda: service._replicator.trouble is not None)
    assert "--max-cache" in trouble(service).message
    assert bytes_in(directory) < 1 << 20
    assert "--max-cache" in str((await ask(service, "status"))["trouble"])
    await attempts_stay_few(service, server)


async def test_a_huge_artifact_is_not_started_and_delays_nothing(
    server: FakeServer, service: Service, directory: Path
) -> None:
    await ask(service, "ready")
    server.broadcast(server.numbered(AnnounceFile("artifacts/payload/huge", 1 << 60, b"d" * 32)))
    await until(lambda: service._payload_fetcher.trouble is not None)
    payloads = (await ask(service, "status"))["payloads"]
    assert payloads["deferred"] == 1 and "--max-cache" in payloads["trouble"]  # type: ignore[index]
    assert (await ask(service, "ready"))["current"]
    assert not [frame for frame in server.frames if isinstance(frame, Download)]
    with pytest.raises(RemoteError, match="--max-cache"):
        await ask(service, "fetch", paths=None)
    assert bytes_in(directory) < 1 << 20


@pytest.mark.parametrize("lie", ["endless", "another size", "another digest", "nothing", "wrong content"])
async def test_invalid_parts_of_an_artifact_are_discarded(
    server: FakeServer, service: Service, directory: Path, lie: str
) -> None:
    size, digest = 300_000, digest_of(bytes(300_000))

    async def misbehave(connection: ServerConnection, frame: ClientFrame) -> bool:
        if not isinstance(frame, Download):
            return False
        data = {"endless": bytes(1 << 20), "nothing": b"", "wrong content": b"x" * frame.limit}.get(
            lie, bytes(frame.limit)
        )
        told = (size + (lie == "another size"), b"d" * 32 if lie == "another digest" else digest)
        await connection.send(encode(Downloaded(frame.id, server.seq, *told, data)))
        return True

    await ask(service, "ready")
    server.misbehave = misbehave  # type: ignore[assignment]
    server.broadcast(server.numbered(AnnounceFile("artifacts/payload/x", size, digest)))
    await until(lambda: service._payload_fetcher.trouble is not None)
    assert not (directory / "artifacts/payload/x").exists()
    assert bytes_in(directory) < 1 << 20
    assert sum(isinstance(frame, Download) for frame in server.frames) < 50
    assert (await ask(service, "ready"))["current"]
    server.misbehave = None
    server.files["artifacts/payload/x"] = bytes(size)
    await ask(service, "fetch", paths=None)
    assert (directory / "artifacts/payload/x").read_bytes() == bytes(size)


async def test_a_manifest_over_the_limit_is_refused(
    server: FakeServer, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_server.PIECE", 1 << 16)
    allow_one_mib(server)
    server.files |= {f"artifacts/payload/{n}": bytes(200_000) for n in range(8)}
    answer = await ask(service, "ready")
    assert not answer["current"] and "1 MiB allowed" in str(answer["message"])
    assert not any(isinstance(frame, Fetch) for frame in server.frames)
    assert bytes_in(directory) < 100_000
    trusted_servers.record(trusted_servers.name(server.url, max_cache_mib=4))
    service._connection.kick()
    await until(service._is_current, 20)
    assert tree(directory) == server.files


async def test_endless_files_stop_at_the_limit(server: FakeServer, service: Service, directory: Path) -> None:
    allow_one_mib(server)
    await ask(service, "ready")
    for n in range(100):
        server.put(f"artifacts/payload/{n}", bytes(100_000))
    await until(lambda: service._replicator.trouble is not None, 20)
    assert "1 MiB allowed" in trouble(service).message
    await attempts_stay_few(service, server)
    stored = bytes_in(directory)
    assert stored < 3 << 20
    for _ in range(5):  # a new connection does not reset the limit
        before = len(server.requests)
        service._connection.kick()
        await until(lambda before=before: len(server.requests) > before and service._replicator.trouble is not None, 20)
    assert bytes_in(directory) < stored + 200_000
    server.put("artifacts/payload/last", b"x")
    with pytest.raises(RemoteError, match="1 MiB allowed"):
        await run(service, "list")


async def test_unrequested_replies_are_not_kept(server: FakeServer, service: Service) -> None:
    await ask(service, "ready")
    connection = next(iter(server.connections))
    for n in range(300):
        id_ = f"{n:032x}"
        await connection.send(encode(Reply(id_, 1 << 60, 0, bytes(10_000), b"")))
        await connection.send(encode(Stored(id_, 1 << 60, "stored")))
        await connection.send(encode(Refused(id_, "REMOTE_FAILED", "x")))
    server.put("tasks/after.json", b"x")
    await until(lambda: service._replicator.replica.position.seq == 1)
    assert service._replicator.replica._answers == [] and service._is_current()
    assert service._connection.failed_attempts == 0


@pytest.mark.parametrize("kind", ["empty pieces", "a part that brings nothing", "an empty piece of a manifest"])
async def test_an_endless_response_is_ended(server: FakeServer, service: Service, kind: str) -> None:
    async def endless(connection: ServerConnection, frame: ClientFrame) -> bool:
        match kind, frame:
            case "empty pieces", Run():
                await connection.send([b"x", *[b""] * 5000])
            case "a part that brings nothing", Fetch():
                await connection.send(encode(Part(frame.paths[0], server.seq, 9, b"d" * 32, 0, b"")))
            case "an empty piece of a manifest", Manifest():
                await connection.send(encode(Entries(server.seq, server.mark, [], last=False)))
            case _:
                return False
        return True

    await ask(service, "ready")
    server.misbehave = endless  # type: ignore[assignment]
    if kind == "empty pieces":
        asking = asyncio.ensure_future(run(service, "list"))
    elif kind == "a part that brings nothing":
        asking = None
        server.broadcast(server.numbered(AnnounceFile("artifacts/payload/x", 9, b"d" * 32)))
    else:
        asking = asyncio.ensure_future(ask(service, "verify"))
    await until(lambda: service._connection.error is not None)
    assert trouble(service).code == "REMOTE_PROTOCOL"
    if asking is not None:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def endless(piece: bytes) -> Callable[[bytes], Iterator[bytes]]:
    return lambda _: itertools.repeat(piece)


BODY = b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\n"
BOMB = zlib.compress(bytes(20_000_000), 9)


@pytest.mark.parametrize(
    ("script", "most"),
    [
        (lambda key: itertools.chain([BODY + b"\r\n"], itertools.repeat(b"x" * 65536)), 8 << 20),
        (lambda key: itertools.chain([BODY], itertools.repeat(b"X-More: x\r\n" * 1000)), 8 << 20),
        (endless(b"x" * 65536), 8 << 20),
        (
            lambda key: iter([BODY + b"Content-Encoding: deflate\r\nContent-Length: %d\r\n\r\n" % len(BOMB), BOMB]),
            1 << 20,
        ),
        (lambda key: iter([upgraded(key, b"Sec-WebSocket-Extensions: permessage-deflate")]), 1 << 20),
        (lambda key: iter([upgraded(key), b"\xc2\x7f" + len(BOMB).to_bytes(8, "big") + BOMB]), 1 << 20),
        (
            lambda key: itertools.chain([upgraded(key), b"\x82\x7f\x7f" + b"\xff" * 7], itertools.repeat(bytes(65536))),
            8 << 20,
        ),
    ],
    ids=["body", "headers", "first line", "deflated body", "extension", "compressed frame", "huge frame"],
)
async def test_endless_or_meaningless_bytes_end_the_connection(
    tmp_path: Path, script: Callable[[bytes], Iterator[bytes]], most: int
) -> None:
    async with RawServer(script).running() as raw:
        service = Service(str(make_cache(tmp_path / "ana", raw.url)))
        service.start(TOKEN)
        await until(lambda: service._connection.error is not None, 20)
        assert trouble(service).code in {
            "REMOTE_UNREACHABLE",
            "REMOTE_PROTOCOL",
            "REMOTE_FORBIDDEN",
            "REMOTE_TOO_LARGE",
        }
        await service.close()
        assert raw.sent / max(1, raw.connections) < most


async def test_limits_of_zero_refuse_locally_what_the_server_would_refuse(
    server: FakeServer, service: Service, directory: Path
) -> None:
    server.limits = Limits(0, 0)
    server.files[PLAN] = b"# Plan\n"
    await ask(service, "ready")
    (directory / PLAN).write_bytes(b"# Plan\nmine\n")
    with pytest.raises(Rejected, match="the server takes at most 0") as error:
        await run(service, "list")
    assert error.value.code == "REMOTE_TOO_LARGE"
    answer = await ask(service, "push")
    assert answer["sent"] == [{"path": PLAN, "outcome": "refused"}]
    assert not any(isinstance(frame, Run | Put) for frame in server.frames)
    assert service._connection.failed_attempts == 0


# --- endless resyncs and unreachable positions ---


@pytest.mark.parametrize("manner", ["another epoch each time", "the same epoch, but from the start"])
async def test_endless_resyncs_become_an_error(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    monkeypatch.setattr(dial, "MAX_DELAY_S", 0.05)
    await ask(service, "ready")

    async def anew(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Hello):
            if manner == "another epoch each time":
                server.epoch = os.urandom(8).hex()
            else:
                server.changes = [Change(1, os.urandom(16), "", "x", "t", "edit", "", [])]
            asyncio.get_running_loop().call_later(0.1, connection.transport.abort)
        return False

    server.misbehave = anew  # type: ignore[assignment]
    server.cut()
    await until(lambda: service._connection.is_barred, 20)
    connections, asked = len(server.requests), len(server.frames)
    assert connections <= 2 * dial.MAX_RESETS
    for _ in range(5):
        with pytest.raises(ConnectionFailed, match=r"reset this cache \d+ times within 10 minutes.*its log"):
            await run(service, "list")
        answer = await ask(service, "ready")
        assert not answer["current"] and answer["filled"] and "reset this cache" in str(answer["message"])
    status = await ask(service, "status")
    assert not status["connected"] and "reset this cache" in str(status["error"])
    assert (len(server.requests), len(server.frames)) == (connections, asked)


async def test_a_sequence_number_that_no_change_reaches_is_given_up(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.client.agent.service.STALLED_S", 0.3)
    monkeypatch.setattr("lattice_remote.client.agent.service._WATCH_INTERVAL_S", 0.05)
    service = Service(str(directory))
    service.start(TOKEN)
    await ask(service, "ready")
    server.head = 1 << 60
    server.cut()
    await until(lambda: service._connection.error is not None and "nothing useful" in service._connection.error.message)
    assert str(1 << 60) in trouble(service).message
    server.head = None
    service._connection.kick()
    await until(service._is_current)
    await service.close()


async def test_a_half_open_connection_is_never_reported_as_connected(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PING_INTERVAL_S": 0.3, "PING_TIMEOUT_S": 0.3, "ALIVE_S": 0.7}.items():
        monkeypatch.setattr(f"lattice_remote.client.connection.connection.{name}", value)
    monkeypatch.setattr("lattice_remote.client.agent.service.ALIVE_S", 0.7)
    with FaultProxy(server.port) as proxy:
        service = Service(str(make_cache(tmp_path / "ben", proxy.url)))
        service.start(TOKEN)
        assert (await ask(service, "ready"))["current"]
        monkeypatch.setattr("lattice_remote.client.agent.service.FIRST_READY_WAIT_S", 0.1)
        proxy.stall()
        stalled = time.monotonic()
        seen: list[bool] = []
        while time.monotonic() - stalled < 20.0 and (not seen or seen[-1]):
            status = await ask(service, "status")
            seen.append(bool(status["connected"]))
            if status["connected"]:
                assert float(str(status["last_heard_s"])) <= 0.7 and status["server_seq"] is not None
            else:
                assert status["server_seq"] is None and float(str(status["last_heard_s"])) > 0.2
            await asyncio.sleep(0.02)
        assert seen[-1] is False
        proxy.flow()
        service._connection.kick()
        await until(service._is_current)
        await service.close()


# --- output and execution ---


async def lattice(cwd: Path, *args: str, **environment: str) -> tuple[int, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        *LATTICE, *args, cwd=cwd, stdin=-3, stdout=-1, stderr=-1, env={**os.environ, **environment}
    )
    async with asyncio.timeout(40):
        out, err = await process.communicate()
    assert process.returncode is not None and b"Traceback" not in err, err
    return process.returncode, out, err


def is_plain(text: bytes) -> bool:
    """Report whether the text is one line without terminal control characters."""
    return text.endswith(b"\n") and text.decode()[:-1].isprintable()


async def test_texts_of_a_server_cannot_control_a_terminal(server: FakeServer, directory: Path) -> None:
    server.tokens[TOKEN] = f"human:{ESCAPES}"

    async def refuse(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Run) and frame.argv[0] == "comment":
            await connection.send(encode(Refused(frame.id, "REMOTE_FAILED", ESCAPES)))
            return True
        if isinstance(frame, Run) and frame.argv[0] == "assign":
            await connection.send(encode(Bye("REMOTE_FORBIDDEN", ESCAPES)))
            return True
        if isinstance(frame, Run):
            await connection.send(encode(Reply(frame.id, server.seq, 1 << 40, ESCAPES.encode(), b"\xff\x1b[0m")))
            return True
        return False

    server.misbehave = refuse  # type: ignore[assignment]
    at, with_token = directory.parent, {"LATTICE_TOKEN": TOKEN}
    code, out, err = await lattice(at, "comment", "X-1", "x", "--actor", "human:a", **with_token)
    assert (code, out) == (1, b"") and is_plain(err) and b"red" in err
    code, out, err = await lattice(at, "assign", "X-1", "human:b", "--actor", "human:a", **with_token)
    assert (code, out) == (1, b"") and is_plain(err) and b"red" in err
    code, out, err = await lattice(at, "remote", "status", **with_token)
    assert code == 0 and all(is_plain(line + b"\n") for line in out.splitlines()) and b"human:" in out
    code, out, err = await lattice(at, "status", "X-1", "done", "--actor", "human:a", **with_token)
    assert (code, out, err) == (1, ESCAPES.encode(), b"\xff\x1b[0m")  # lattice's own output is not filtered


READS = (["list"], ["show", "X-1"], ["comments", "X-1"], ["doctor"], ["next"], ["remote", "sync"])


async def test_hooks_of_a_servers_configuration_never_run_here(
    server: FakeServer, directory: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    command = f"touch {marker}"
    server.files["config.json"] = json.dumps(
        {
            "schema_version": 1,
            "project_code": "X",
            "default_status": "backlog",
            "hooks": {"post_event": command, "on": {"comment_added": command}, "transitions": {"* -> done": command}},
            "editor": command,
            "dashboard": {"command": command},
        }
    ).encode()
    at, with_token = directory.parent, {"LATTICE_TOKEN": TOKEN, "EDITOR": command, "PAGER": command}
    done = [await lattice(at, *words, **with_token) for words in READS]
    await lattice(at, "comment", "X-1", "x", "--actor", "human:a", **with_token)
    assert not marker.exists()
    assert done[0][0] == 0 and tree(directory)["config.json"] == server.files["config.json"]
    assert not re.search(rb"touch", b"".join(err for _, _, err in done))
