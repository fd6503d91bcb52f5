"""The agent process: start, sharing, replacement, idle exit, removed caches."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_kit import agent_ends, agent_pid, ask, request, resident_kib, run, status  # noqa: F401 - a fixture
from client_kit import make_cache, tree, until
from fake_server import FakeServer

from lattice_remote.client import agent_client, agent_runtime
from lattice_remote.errors import RemoteError


async def test_the_first_command_starts_the_agent_and_later_ones_share_it(server: FakeServer, tmp_path: Path) -> None:
    assert await status() is None
    one, two = make_cache(tmp_path / "a", server.url), make_cache(tmp_path / "b", server.url)
    await run(one, "put", "tasks/x.json", "x")
    assert (await ask("ready", two))["current"]
    await until(lambda: tree(one) == tree(two) == server.files)
    found = await status()
    assert found is not None and found["pid"] == agent_pid()
    assert [cache["directory"] for cache in found["caches"]] == [str(one), str(two)]
    assert oct(os.stat(found["socket"]).st_mode)[-3:] == "600"


async def test_of_two_agents_started_at_once_one_remains(server: FakeServer, directory: Path) -> None:
    answers = await asyncio.gather(*(ask("ready", directory) for _ in range(3)))
    assert all(answer["current"] for answer in answers)
    found = await status()
    assert found is not None and found["pid"] == agent_pid()
    assert sum(server.connections.values()) == 1


async def test_threads_of_one_program_start_one_agent(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start costs half a second of CPU time. Forty at once delayed an MCP server by ten seconds."""
    starts: list[object] = []
    popen = subprocess.Popen

    def start(*args: Any, **options: Any) -> "subprocess.Popen[bytes]":
        starts.append(args)
        return popen(*args, **options)

    monkeypatch.setattr("lattice_remote.client.agent_client.subprocess.Popen", start)
    answers = await asyncio.gather(*(ask("ready", directory) for _ in range(12)))
    assert all(answer["current"] for answer in answers)
    assert len(starts) == 1


async def test_a_killed_agent_is_replaced_and_the_command_runs_once(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    before = agent_pid()
    assert before is not None

    async def kill(_: object, frame: object) -> bool:
        if type(frame).__name__ == "Run" and server.misbehave is not None:
            server.misbehave = None
            os.kill(before, signal.SIGKILL)
        return False

    server.misbehave = kill  # type: ignore[assignment]
    answer = await run(directory, "append", "events/x.jsonl", "once\n")
    assert answer["exit_code"] == 0 and agent_pid() != before
    assert server.files["events/x.jsonl"] == b"once\n"
    assert tree(directory) == server.files


def make_file(path: str) -> None:
    Path(path).write_bytes(b"")


async def test_a_stale_socket_is_no_obstacle(server: FakeServer, directory: Path) -> None:
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    make_file(place.socket)
    assert (await ask("ready", directory))["current"]


async def test_an_idle_agent_exits(server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_AGENT_IDLE_S", "0.2")
    await ask("ready", directory)
    await until(lambda: not os.path.exists(agent_runtime.locate().socket))
    assert await status() is None


async def test_files_of_dead_agents_are_removed_with_their_directory(
    server: FakeServer, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    dead, recent, foreign = (tmp_path / f"lattice-remote-{os.getuid()}-{name}" for name in ("a", "b", "c"))
    for place, names in ((dead, ["lock", "log", "sock"]), (recent, ["log"]), (foreign, ["log"])):
        place.mkdir()
        for name in names:
            (place / f"agent-x.{name}").touch()
            if place != recent:
                os.utime(place / f"agent-x.{name}", (1e9, 1e9))
    (foreign / "of-the-user").touch()
    await ask("ready", directory)
    await until(lambda: not dead.exists() and not (foreign / "agent-x.log").exists())
    assert (recent / "agent-x.log").exists() and (foreign / "of-the-user").exists()


async def test_a_cache_that_disappears_is_dropped(server: FakeServer, tmp_path: Path) -> None:
    one, two = make_cache(tmp_path / "a", server.url), make_cache(tmp_path / "b", server.url)
    await ask("ready", one)
    await ask("ready", two)
    shutil.rmtree(one.parent)
    await until(lambda: len(server.connections) == 1)
    found = await status()
    assert found is not None and [cache["directory"] for cache in found["caches"]] == [str(two)]
    assert not one.exists()


async def test_a_failing_cache_does_not_affect_others(server: FakeServer, tmp_path: Path) -> None:
    good, bad = make_cache(tmp_path / "a", server.url), make_cache(tmp_path / "b", server.url)
    (bad / "tasks").symlink_to(tmp_path)
    assert "in the way" in (await ask("ready", bad))["message"]
    assert (await ask("ready", good))["current"]


async def test_without_a_runtime_directory_no_agent_starts(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_RUNTIME_DIR", "/dev/null")  # a short path, as a long one is replaced
    assert (await ask("ready", directory))["current"]
    assert await status() is None


async def test_a_directory_of_another_user_gets_no_request(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readline())
        writer.close()

    monkeypatch.setattr(agent_runtime, "_user", lambda: os.getuid() + 1)
    async with await asyncio.start_unix_server(listen, place.socket):
        assert (await ask("ready", directory))["current"]
        assert await status() is None
    assert heard == []


async def test_a_command_waits_for_an_exiting_agent(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    before = agent_pid()
    _, writer = await asyncio.open_unix_connection(agent_runtime.locate().socket)  # delays its exit
    assert await asyncio.to_thread(agent_client.send_if_running, {"do": "agent-stop"})
    async with asyncio.timeout(8):
        assert (await ask("ready", directory))["current"]
    assert agent_pid() not in (None, before) and await status() is not None
    writer.close()


async def test_an_agent_that_cannot_start_delays_no_command(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_AGENT_IDLE_S", "no number")
    async with asyncio.timeout(5):
        assert (await ask("ready", directory))["current"]


async def test_a_disabled_agent_is_not_started(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", "off")
    assert (await run(directory, "put", "tasks/x.json", "x"))["exit_code"] == 0
    assert tree(directory) == server.files and agent_pid() is None


async def test_the_agent_answers_malformed_requests_and_keeps_running(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    files = [{"index": 0, "name": 7, "data": None}]
    unnamed = request("run", directory, id="0" * 32, argv=["x"], files=files, agent=agent_runtime.locate().name)
    nonsense = (b"nonsense", b"[]", b"{}", b'{"do": "ready", "directory": 7}', b'{"do": "ready"}')
    for line in (*nonsense, json.dumps(unnamed).encode()):
        reader, writer = await asyncio.open_unix_connection(agent_runtime.locate().socket)
        writer.write(line + b"\n")
        lines = [json.loads(await reader.readline()) for _ in range(2)]
        writer.close()
        await writer.wait_closed()
        assert lines[0] == {"progress": None} and lines[1]["ok"] is False
    assert (await ask("ready", directory))["current"]


async def test_a_request_for_another_agent_or_cache_is_refused(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    place = agent_runtime.locate()
    mine = {**request("ready", directory), "agent": place.name}
    device, inode, url, project = mine["cache"]
    others = ([device, inode + 1, url, project], [device, inode, "http://other", project], [device, inode, url, "x"])
    for changed in ({"agent": "agent-0000000000"}, *({"cache": other} for other in others)):
        stream = agent_client._connect(place)
        assert stream is not None
        with contextlib.closing(stream):
            answer = await asyncio.to_thread(agent_client._exchange, stream, {**mine, **changed}, None)
        assert answer == {"ok": True, "not_mine": True}
    asked = len(server.requests)
    for other in others:  # the command runs the request itself and detects the replaced remote
        with pytest.raises(RemoteError, match="was replaced while this command ran"):
            await ask("run", directory, cache=other, id=os.urandom(16).hex(), argv=["put", "x", "x"], files=[])
    assert len(server.requests) == asked


async def test_an_interrupted_command_releases_its_connection(server: FakeServer, directory: Path) -> None:
    asked = request("run", directory, own_connection=True, id=os.urandom(16).hex(), argv=["slow"], files=[])
    await ask("ready", directory)
    place = agent_runtime.locate()
    _, writer = await asyncio.open_unix_connection(place.socket)
    writer.write(json.dumps({**asked, "agent": place.name}).encode() + b"\n")
    await until(lambda: len(server.connections) == 2)
    writer.close()
    await until(lambda: sum(connection.close_code is None for connection in server.connections) == 1)


async def test_agent_memory_is_bounded(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    assert resident_kib() < 60 * 1024


async def test_an_error_keeps_its_exit_code(directory: Path, server: FakeServer) -> None:
    with pytest.raises(RemoteError) as error:
        await run(directory, "refuse")
    assert error.value.code == "REMOTE_FORBIDDEN"


def test_the_agent_imports_no_unneeded_modules() -> None:
    import subprocess

    heavy = {"typer", "rich", "lattice", "click"}
    script = f"import lattice_remote.client.agent.main, sys; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not done.stdout.split()
