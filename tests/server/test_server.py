"""Server process: startup line, lock, signals and shutdown, with real lattice."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from harness import Copy, tree_of
from server_process import COMMAND, Process, children_of, is_gone

from lattice_remote.protocol.messages import Reply, Run, encode
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.registry import STOP_S
from lattice_remote.server.tokens import TokenFile
from sandbox import descendants, wait_for


def make_data(path: Path) -> DataDir:
    made = DataDir(path)
    made.create()
    made.create_project("web", code="WEB", name=None, actor=None)
    return made


def make_token(data: DataDir) -> str:
    return TokenFile(data.tokens).create(projects=["web"], actor="human:ana", act_as=["agent:*"])[1]


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return make_data(tmp_path / "data")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server shared by all tests that do not stop it."""
    started = Process(make_data(tmp_path_factory.mktemp("app") / "data"))
    yield started
    assert started.end() == 0


def test_plain_http_answers_in_json(process: Process) -> None:
    status, body = process.get("/healthz")
    assert (status, body["status"], body["projects"]) == (200, "ok", 1)
    for path, method, expected in (
        ("/nothing", "GET", 404),
        ("/healthz", "POST", 405),
        ("/projects/web/ws", "GET", 426),
    ):
        status, body = process.get(path, method)
        assert status == expected
        assert set(body["error"]) == {"code", "message"}  # type: ignore[call-overload]


def test_the_server_holds_many_connections(process: Process) -> None:
    limits = Path(f"/proc/{process.process.pid}/limits").read_text()
    soft, hard = next(line.split()[3:5] for line in limits.splitlines() if line.startswith("Max open files"))
    assert int(soft) == min(int(hard), 65_536) if hard != "unlimited" else int(soft) >= 65_536


def test_a_second_server_on_the_same_directory_is_refused(process: Process) -> None:
    second = subprocess.run(
        [*COMMAND, "start", "--data", process.data.path, "--port", "0"], capture_output=True, text=True, check=False
    )
    assert second.returncode == 1
    assert second.stdout == ""
    assert f"pid {process.process.pid}" in second.stderr
    assert len(second.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--port", "--metrics-listen"])
def test_a_port_in_use_is_one_line(process: Process, tmp_path: Path, option: str) -> None:
    other = DataDir(tmp_path / "other")
    other.create()
    where = f"127.0.0.1:{process.port}"
    taken = ["--port", str(process.port)] if option == "--port" else ["--port", "0", option, where]
    second = subprocess.run(
        [*COMMAND, "start", "--data", other.path, *taken],
        capture_output=True,
        text=True,
        check=False,
    )
    assert second.returncode == 1
    assert len(second.stderr.splitlines()) == 1
    assert f"cannot listen on {where}: Address already in use; choose another {option}" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_server_stops_in_order_with_a_client_connected(data: DataDir, number: int) -> None:
    process = Process(data)
    async with process.connected(make_token(data)) as client:
        copy = Copy()
        await copy.greet(client)
        assert isinstance(await copy.run("create", "a task", "--actor", "human:ana"), Reply)
        before = time.monotonic()
        assert await asyncio.to_thread(process.end, number) == 0
        assert time.monotonic() - before < 20


async def test_the_server_stops_in_time_with_stalled_readers_and_a_hung_worker(data: DataDir) -> None:
    token = make_token(data)
    process = Process(data)
    async with process.connected(token) as client, contextlib.AsyncExitStack() as opened:
        copy = Copy()
        await copy.greet(client)
        for n in range(20):
            await copy.run("create", f"task {n}", "--description", "y" * 250_000, "--actor", "human:ana")
        readers = [stalled_reader(process.port, token, "/projects/web/tasks") for _ in range(20)]
        for reader in readers:
            opened.enter_context(reader)
        assert await asyncio.to_thread(readers[0].recv, 12) == b"HTTP/1.1 200"
        [worker] = children_of(process, b".worker.main\0")
        os.kill(worker, signal.SIGSTOP)
        await client.send(encode(Run("1" * 32, ["create", "never answered", "--actor", "human:ana"], [])))
        assert await asyncio.to_thread(process.end) == 0
    [took_s] = re.findall(r"stopped after ([0-9.]+) s", (data.path.parent / "log").read_text())
    assert float(took_s) < STOP_S + 0.3, "the process itself ends in the rest of 2 s"


def stalled_reader(port: int, token: str, path: str) -> socket.socket:
    """Return a connection that sends requests and reads nothing."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
    return reader


async def test_a_killed_server_is_succeeded_by_another_with_nothing_lost(data: DataDir) -> None:
    first, token = Process(data), make_token(data)
    copy = Copy()
    async with first.connected(token) as client:
        await copy.greet(client)
        await copy.sync()
        reply = await copy.run("create", "a task", "--actor", "human:ana")
        assert isinstance(reply, Reply)
        assert reply.exit_code == 0, reply.stderr
        for i in range(20):
            await copy.run("comment", "WEB-1", f"no {i}", "--actor", "agent:claude")
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    copy.replica.disconnected()
    second = Process(data)
    try:
        async with second.connected(token) as client:
            await copy.greet(client)
            await copy.sync()
            assert (await copy.run("comment", "WEB-1", "last", "--actor", "human:ana")).seq >= 22  # type: ignore[union-attr]
            assert "ids.json" in copy.tree
            assert copy.tree == tree_of(data.project("web").lattice)
    finally:
        assert second.end() == 0


async def test_a_worker_killed_under_load_answers_everything_once(process: Process) -> None:
    async with process.connected(make_token(process.data)) as client:
        copy = Copy()
        await copy.greet(client)
        await copy.sync()
        await copy.run("create", "a task", "--actor", "human:ana")

        answered = asyncio.Event()

        async def kill() -> None:
            for _ in range(2):
                answered.clear()
                await answered.wait()  # the next request is on its way by then
                for pid in descendants(process.process.pid):
                    os.kill(pid, signal.SIGKILL)

        killing = asyncio.create_task(kill())
        sent = 0
        while not killing.done() or sent < 40:
            reply = await copy.run("comment", "WEB-1", f"comment {sent}", "--actor", "human:ana")
            assert isinstance(reply, Reply)
            assert reply.exit_code == 0
            sent += 1
            if sent % 10 == 0:
                answered.set()
        await copy.sync()
        tree = process.data.project("web").lattice
        assert copy.tree == tree_of(tree)
        [events] = (tree / "events").glob("task_*.jsonl")
        bodies = [json.loads(line)["data"].get("body") for line in events.read_text().splitlines()][1:]
        assert bodies == [f"comment {i}" for i in range(sent)]


def test_processes_of_an_unused_project_leave_and_come_back(data: DataDir) -> None:
    (data.path / "config.json").write_text('{"idle_seconds": 0.05}')
    for other in ("two", "three", "four"):  # no longer a few
        shutil.copytree(data.project("web").root, data.project(other).root)
    server = Process(data)
    url, headers = f"http://127.0.0.1:{server.port}/projects/web/tasks", {"Authorization": f"Bearer {make_token(data)}"}

    def work(thread: int) -> list[str]:
        """Write and read; every third time only the template is left before."""
        made = []
        for n in range(8):
            if n % 3 == thread % 3:
                wait_for(lambda: len(descendants(server.process.pid)) <= 1, "workers and readers to leave")
            answer = requests.post(url, json={"title": f"{thread}.{n}"}, headers=headers, timeout=60)
            assert answer.status_code == 201, answer.text
            made.append(answer.json()["data"]["id"])
            listed = requests.get(url, headers=headers, timeout=60)
            assert listed.status_code == 200, listed.text
            assert made[-1] in [task["id"] for task in listed.json()["data"]]
        return made

    try:
        with ThreadPoolExecutor(2) as pool:
            made = [task for tasks in pool.map(work, range(2)) for task in tasks]
        assert len(set(made)) == 16
        wait_for(lambda: len(descendants(server.process.pid)) == 1, "workers and readers to leave")
        [template] = descendants(server.process.pid)
    finally:
        assert server.end() == 0
    assert is_gone(template)
    assert "ERROR" not in (data.path.parent / "log").read_text()


def test_a_server_alone_needs_nothing_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['nats'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    data = make_data(tmp_path / "data")
    server = Process(data)
    try:
        url = f"http://127.0.0.1:{server.port}/projects/web/tasks"
        headers = {"Authorization": f"Bearer {make_token(data)}"}
        assert requests.post(url, json={"title": "alone"}, headers=headers, timeout=60).status_code == 201
    finally:
        assert server.end() == 0
    joining = [*COMMAND, "--data", data.path, "start", "--port", "0", "--cluster", "nats://127.0.0.1:9", "--node", "a"]
    refused = subprocess.run(joining, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "pip install 'lattice-remote[cluster]'" in refused.stderr
