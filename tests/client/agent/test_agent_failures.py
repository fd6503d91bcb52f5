"""Agent failures: frozen processes, upgrades, other users of the runtime directory, failing caches."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_kit import agent_ends, agent_pid, ask, is_zombie, request, run, status  # noqa: F401 - a fixture, request
from client_kit import make_cache, tree, until
from fake_server import FakeServer

import lattice_remote
from faultproxy import FaultProxy
from lattice_remote.client import agent_client, agent_runtime
from lattice_remote.client.agent.main import _KEPT_LOG_BYTES, _MAX_LOG_BYTES
from lattice_remote.errors import ConnectionFailed, StorageError


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}/cmdline") and not is_zombie(pid)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- frozen ---


async def test_commands_run_without_a_frozen_agent_and_report_it(
    server: FakeServer, directory: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask("ready", directory)
    pid = agent_pid()
    assert pid is not None
    with frozen(pid), monkeypatch.context() as patched:
        patched.setattr(agent_client, "FIRST_WORD_TIMEOUT_S", 0.3)
        began = time.monotonic()
        assert (await ask("ready", directory))["current"]
        assert time.monotonic() - began < 20
        said = f"lattice-remote: the background agent, process {pid}, does not answer; this command runs without it\n"
        assert capfd.readouterr().err == said
        assert (await run(directory, "append", "events/x.jsonl", "once\n"))["exit_code"] == 0
        assert (directory / "events/x.jsonl").read_bytes() == b"once\n"
        assert capfd.readouterr().err == "", "a program that asks every two seconds says it once"
        with pytest.raises(ConnectionFailed, match=f"process {pid}, does not answer"):
            await status()
    await until(lambda: tree(directory) == server.files)
    await run(directory, "append", "events/x.jsonl", "twice\n")
    assert server.files["events/x.jsonl"] == b"once\ntwice\n"  # the agent resumed and sent the request again (I6)
    assert tree(directory) == server.files and agent_pid() == pid


async def test_a_command_does_not_wait_for_an_agent_that_freezes_during_a_request(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask("ready", directory)
    pid = agent_pid()
    assert pid is not None
    monkeypatch.setattr(agent_client, "SILENCE_TIMEOUT_S", 0.5)

    async def freeze(_: object, frame: object) -> bool:
        if type(frame).__name__ == "Run" and server.misbehave is not None:
            server.misbehave = None
            os.kill(pid, signal.SIGSTOP)
        return False

    server.misbehave = freeze  # type: ignore[assignment]
    try:
        assert (await run(directory, "append", "events/x.jsonl", "once\n"))["exit_code"] == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert server.files["events/x.jsonl"] == b"once\n"
    await until(lambda: tree(directory) == server.files)


def hold(lock: Path) -> subprocess.Popen[bytes]:
    """Start a process that holds a lock until its stdin is closed."""
    script = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder


async def test_commands_work_while_a_frozen_process_locks_the_cache_and_report_it(
    server: FakeServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask("ready", directory)
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", "off")
    holder = await asyncio.to_thread(hold, directory / ".remote/lock")
    try:
        began = time.monotonic()
        answer = await ask("ready", directory)
        assert answer["filled"] and not answer["current"]
        assert answer["message"] == f"{directory} is locked by another process"
        answer = await run(directory, "put", "events/x.jsonl", "once\n")
        assert answer["exit_code"] == 0
        assert answer["notices"] == [f"done, but the cache is behind: {directory} is locked by another process"]
        assert time.monotonic() - began < 20
        assert server.files["events/x.jsonl"] == b"once\n" and not (directory / "events/x.jsonl").exists()
    finally:
        await asyncio.to_thread(holder.communicate)
    assert (await ask("ready", directory))["current"]
    assert tree(directory) == server.files


# --- upgraded ---


def upgrade(package: Path, version: str) -> None:
    """Replace the package with new files, as an installer does."""
    text = (package / "__init__.py").read_text().replace(lattice_remote.__version__, version)
    (package / "new.py").write_text(text)
    os.replace(package / "new.py", package / "__init__.py")


def command(environment: dict[str, str], directory: Path) -> dict[str, object]:
    """Run a command in a process that imports the package through ``PYTHONPATH``."""
    script = "import json, sys; from lattice_remote.client import agent_client as a; print(json.dumps([\
        a.send_request(json.loads(sys.argv[1])), a.send_if_running({'do': 'agent-status'})]))"
    asked = json.dumps(request("ready", directory))
    done = subprocess.run(
        [sys.executable, "-c", script, asked], env=environment, capture_output=True, text=True, check=True
    )
    answer, agent = json.loads(done.stdout)
    assert answer["current"]
    return dict(agent)


async def test_an_upgraded_package_replaces_the_agent(server: FakeServer, directory: Path, tmp_path: Path) -> None:
    package = tmp_path / "installed" / "lattice_remote"
    source = Path(lattice_remote.__file__).parent
    await asyncio.to_thread(shutil.copytree, source, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    old = await asyncio.to_thread(command, environment, directory)
    assert old["version"] == lattice_remote.__version__
    upgrade(package, "9.9.9")
    old_pid = int(str(old["pid"]))
    await until(lambda: not is_alive(old_pid))
    new = await asyncio.to_thread(command, environment, directory)
    assert new["version"] == "9.9.9" and new["pid"] != old["pid"]
    upgrade(package, "9.9.9")
    new_pid = int(str(new["pid"]))
    await until(lambda: not is_alive(new_pid))
    await until(lambda: not list(Path(agent_runtime.locate().directory).glob("*.sock")))


async def test_an_agent_with_another_protocol_gets_no_request(
    server: FakeServer, directory: Path, tmp_path: Path
) -> None:
    package = tmp_path / "former" / "lattice_remote"
    source = Path(lattice_remote.__file__).parent
    await asyncio.to_thread(shutil.copytree, source, package, ignore=shutil.ignore_patterns("__pycache__"))
    place = package / "client" / "agent_runtime.py"
    place.write_text(re.sub(r"_LANGUAGE = \d+", "_LANGUAGE = 1", place.read_text()))
    former = {**os.environ, "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    old = await asyncio.to_thread(command, former, directory)
    assert is_alive(int(str(old["pid"])))
    other = make_cache(tmp_path / "ben", server.url)
    new = await asyncio.to_thread(command, dict(os.environ), other)
    assert new["version"] == old["version"] and new["pid"] != old["pid"]
    shutil.rmtree(package)
    await until(lambda: not is_alive(int(str(old["pid"]))))


# --- the runtime directory ---


def test_files_of_others_are_removed_from_a_directory_that_was_writable(home: Path) -> None:
    place = agent_runtime.locate()
    os.mkdir(place.directory)
    os.chmod(place.directory, 0o777)  # noqa: S103 - that is what must be put right
    precious = home / "precious"
    precious.write_text("mine")
    Path(place.pid).symlink_to(precious)
    with pytest.raises(StorageError, match="writable by others"):
        agent_runtime.check(place)
    agent_runtime.prepare(place)
    agent_runtime.check(place)
    assert os.listdir(place.directory) == [] and precious.read_text() == "mine"
    assert oct(os.stat(place.directory).st_mode)[-3:] == "700"


def test_a_link_that_replaces_the_directory_is_refused(home: Path) -> None:
    place = agent_runtime.locate()
    (home / "elsewhere").mkdir()
    Path(place.directory).symlink_to(home / "elsewhere")
    with pytest.raises(StorageError, match="not a directory of this user"):
        agent_runtime.prepare(place)


def test_a_socket_of_another_user_gets_no_request(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as planted:
        planted.bind(place.socket)
        planted.listen()
        agent_runtime.check_socket(place)
        if os.getuid() == 0:
            os.chown(place.socket, 12345, -1)
        else:
            monkeypatch.setattr(agent_runtime, "_user", lambda: os.getuid() + 1)
        with pytest.raises(StorageError, match="not a socket of this user"):
            agent_runtime.check_socket(place)
        assert agent_client._connect(place) is None


@pytest.mark.parametrize("length", [60, 120, 240])
def test_a_socket_path_that_is_too_long_is_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    long = f"{tmp_path}/{'d' * length}"
    monkeypatch.setenv("LATTICE_REMOTE_RUNTIME_DIR", long)
    monkeypatch.setenv("TMPDIR", long)
    Path(long).mkdir()
    place = agent_runtime.locate()
    assert len(place.socket.encode()) <= 103 and place.directory.startswith("/tmp/lattice-remote-")
    other = long + "2"
    monkeypatch.setenv("LATTICE_REMOTE_RUNTIME_DIR", other)
    assert agent_runtime.locate().directory != place.directory


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


async def test_the_log_is_bounded(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    log = Path(agent_runtime.locate().log)
    lines = [f"line {n:08} {'x' * 85}\n" for n in range(_MAX_LOG_BYTES // 100 + 10)]
    await asyncio.to_thread(append, log, "".join(lines))
    await until(lambda: log.stat().st_size <= _KEPT_LOG_BYTES)
    kept = (await asyncio.to_thread(log.read_text)).splitlines()
    assert kept[-1].startswith(f"line {_MAX_LOG_BYTES // 100 + 9:08}") and kept[0].startswith("line ")


async def test_the_agent_stops_soon_during_a_long_command(server: FakeServer, directory: Path) -> None:
    await ask("ready", directory)
    pid = agent_pid()
    assert pid is not None
    slow = asyncio.ensure_future(run(directory, "slow"))
    await until(lambda: any(type(frame).__name__ == "Run" for frame in server.frames))
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    await until(lambda: not is_alive(pid))
    print(f"stopped in {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 20, "1.7 s on a quiet machine"
    server.slow.set()
    assert (await slow)["exit_code"] == 0


# --- caches ---


async def test_a_cache_replaced_by_another_clone_is_reopened(server: FakeServer, tmp_path: Path) -> None:
    one, two = make_cache(tmp_path / "a", server.url), make_cache(tmp_path / "b", server.url)
    await run(one, "put", "tasks/x.json", "x")
    await ask("ready", two)
    os.rename(tmp_path / "a", tmp_path / "away")
    os.rename(tmp_path / "b", tmp_path / "a")
    assert (await run(one, "put", "tasks/y.json", "y"))["exit_code"] == 0
    assert tree(one) == server.files
    renamed = tmp_path / "away" / ".lattice"
    assert (await ask("ready", renamed))["current"]
    assert tree(renamed) == server.files
    found = await status()
    assert found is not None
    await until(lambda: sum(connection.close_code is None for connection in server.connections) == 2)
    (one / "tasks/x.json").write_bytes(b"altered")
    await until(lambda: tree(one) == server.files)


@contextlib.contextmanager
def full_disk(root: Path) -> Iterator[None]:
    """Mount a disk at ``root`` that has one free page.

    Without the right to mount, replace a directory with a file, which also fails the cache's writes.
    """
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(root)], capture_output=True, check=False
    )
    try:
        yield
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", "-l", str(root)], check=True)


def fill_up(directory: Path) -> None:
    if not os.path.ismount(directory.parent):
        (directory / "artifacts").write_bytes(b"in the way")
        return
    with contextlib.suppress(OSError), (directory / ".filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


async def latency_ms(directories: list[Path], rounds: int) -> float:
    """Return the median latency of one write at a time to each cache."""
    times = []
    for n in range(rounds):
        for directory in directories:
            began = time.monotonic()
            await run(directory, "put", f"tasks/{directory.parent.name}.json", str(n))
            times.append(time.monotonic() - began)
    return statistics.median(times) * 1000


async def test_three_failing_caches_do_not_slow_seventeen_others(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [make_cache(tmp_path / f"good{n}", server.url) for n in range(17)]
    with (
        full_disk(tmp_path / "full"),
        FaultProxy(server.port) as stalled,
        contextlib.closing(socket.socket()) as bound,
    ):
        bound.bind(("127.0.0.1", 0))  # it does not listen, so connections are refused
        refused = make_cache(tmp_path / "refused", f"http://127.0.0.1:{bound.getsockname()[1]}")
        silent = make_cache(tmp_path / "silent", stalled.url)
        place = tmp_path / "full" / ".lattice"
        shutil.copytree(make_cache(tmp_path / "other", server.url), place)
        for directory in (*good, silent, place):
            answer = await ask("ready", directory)
            assert answer["current"], (str(answer), directory)
        before = await latency_ms(good, 2)
        stalled.stall()
        fill_up(place)
        server.put("artifacts/payload/large", b"x" * 200_000)
        in_trouble = [
            asyncio.ensure_future(run(directory, "put", "tasks/t.json", "t")) for directory in (refused, silent, place)
        ]
        with_trouble = await latency_ms(good, 2)
        assert not in_trouble[1].done(), "the silent server has not answered"
        await until(lambda: all(tree(directory) == server.files for directory in good))
        answer = await ask("ready", place)
        assert not answer["current"] and answer["code"] == "REMOTE_STORAGE", answer
        stalled.flow()
        results = await asyncio.gather(*in_trouble, return_exceptions=True)
        assert [getattr(result, "code", "") for result in results[::2]] == ["REMOTE_UNREACHABLE", "REMOTE_STORAGE"]
        with capsys.disabled():
            print(f"a write on 17 caches: {before:.1f} ms, beside 3 in trouble {with_trouble:.1f} ms")
        assert with_trouble < 3 * before + 1000, "an attempt to connect may take 10 s"
