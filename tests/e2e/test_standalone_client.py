"""examples/standalone_client.py, written from SPEC.md, with real servers and caches (I3, I5, I6)."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

import standalone_client
from faultproxy import FaultProxy
from sandbox import Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

PROGRAM = Path(standalone_client.__file__)
Board = tuple[Server, Client, Client]


class Standalone:
    """A directory that the client keeps current, and its server's address."""

    def __init__(self, server: Server, name: str, url: str = "") -> None:
        self.directory = server.log.parent / name
        self.lattice = self.directory / ".lattice"
        self._url = f"{url or server.url}/projects/board"
        self._env = {**os.environ, "LATTICE_TOKEN": server.token(f"human:{name}", "agent:*")}
        self._truth = server.lattice_dir()

    def start(self, *argv: str) -> subprocess.Popen[str]:
        command = [sys.executable, PROGRAM, self._url, self.directory, *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def ok(self, *argv: str) -> str:
        with self.start(*argv) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (argv, out, err)
        return out

    @contextlib.contextmanager
    def following(self) -> Iterator[subprocess.Popen[str]]:
        with self.start() as process:
            try:
                yield process
            finally:
                process.terminate()
                process.communicate(timeout=20)

    def sync(self) -> None:
        with self.following():
            self.becomes_equal()

    @property
    def is_equal(self) -> bool:
        return not differences(self.lattice, self._truth)

    def becomes_equal(self) -> None:
        wait_for(lambda: self.is_equal, f"{self.directory.name} to equal the server")

    @property
    def position(self) -> dict[str, object]:
        return dict(json.loads((self.lattice / ".remote/state.json").read_text()))


def test_the_client_runs_commands_and_follows_changes(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    eve = Standalone(server, "eve")
    task = eve.ok("create", "From outside", "--actor", "human:eve", "--quiet").strip()
    assert eve.is_equal, "the command's changes are in the files when it ends"
    assert "From outside" in ana.ok("list")
    with eve.following():
        ana.ok("comment", task, "größer", "--actor", "human:ana")
        eve.becomes_equal()
        ana.ok("archive", task, "--actor", "human:ana")
        eve.becomes_equal()
        source = ana.dir / "big.bin"
        source.write_bytes(os.urandom(3_000_000))
        other = ana.ok("create", "With a file", "--actor", "human:ana", "--quiet").strip()
        ana.ok("attach", other, str(source), "--actor", "human:ana")
        eve.becomes_equal()
    failed = eve.start("comment", "LAT-999", "x", "--actor", "human:eve")
    with failed:
        failed.communicate(timeout=60)
    assert failed.returncode == 1


def test_edits_of_the_client_arrive_and_conflicts_keep_both_texts(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    eve = Standalone(server, "eva")
    task = ana.ok("create", "Edited from outside", "--actor", "human:ana", "--quiet").strip()
    name = json.loads(ana.ok("show", task, "--json"))["data"]["id"]
    hers, truth = eve.lattice / f"plans/{name}.md", server.lattice_dir() / f"plans/{name}.md"
    with eve.following():
        eve.becomes_equal()
        text = hers.read_text()
        hers.write_text(text + "\nhers\n")
        wait_for(lambda: truth.read_text() == text + "\nhers\n", "the edit on the server")
        hers.unlink()
        eve.becomes_equal()
    hers.write_text("# Rewritten here\n")
    truth.write_text("# Rewritten there\n")
    wait_for(lambda: "Rewritten there" in (ana.lattice_dir / f"plans/{name}.md").read_text(), "the server's edit")
    with eve.following():
        eve.becomes_equal()
    assert hers.with_name(f"{hers.name}.mine").read_text() == "# Rewritten here\n"


def test_with_cut_connections_each_command_runs_once(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    task = ana.ok("create", "Cut", "--actor", "human:ana", "--quiet").strip()
    cuts = random.Random(1)
    with FaultProxy(server.port) as proxy:
        eve = Standalone(server, "evi", proxy.url)
        for n in range(12):
            proxy.cut_after(cuts.randrange(300, 3000))
            eve.ok("comment", task, f"number {n}.", "--actor", "human:evi")
            proxy.flow()
        eve.sync()
    comments = ana.ok("comments", task)
    assert [comments.count(f"number {n}.") for n in range(12)] == [1] * 12


def test_after_kills_the_files_converge(shared_board: Board) -> None:
    server, ana, ben = shared_board
    task = ana.ok("create", "Killed", "--actor", "human:ana", "--quiet").strip()
    eve, moments = Standalone(server, "ela"), random.Random(2)
    eve.sync()
    for n in range(6):
        before = eve.position
        with eve.following() as process:
            for _ in range(4):
                (ana, ben)[n % 2].ok("comment", task, "x", "--actor", "agent:x")
            wait_for(lambda before=before: eve.position != before, "some progress")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.random() / 10)
            process.send_signal(signal.SIGKILL)
    eve.sync()


def test_races_with_real_clients_have_one_winner(shared_board: Board) -> None:
    server, ana, ben = shared_board
    eve = Standalone(server, "edda")
    prize = ana.ok("create", "The prize", "--actor", "human:ana", "--priority", "critical", "--quiet").strip()
    name = json.loads(ana.ok("show", prize, "--json"))["data"]["id"]
    with (ana.lattice_dir / f"plans/{name}.md").open("a") as plan:
        plan.write("\nTake it and run.\n")
    ana.ok("remote", "push")
    argv = ("next", "--claim", "--status", "backlog", "--json", "--actor")
    racers = [
        eve.start(*argv, f"agent:r{n}") if n % 2 else (ana, ben)[n % 4 // 2].popen(*argv, f"agent:r{n}")
        for n in range(6)
    ]
    answers = [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    won = [answer["data"]["id"] for answer in answers if answer.get("data")]
    assert len(won) == len(set(won)) >= 1
    eve.sync()


def test_files_that_another_program_damaged_are_repaired_when_they_change(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    eve = Standalone(server, "eve")
    task = eve.ok("create", "Damaged", "--actor", "human:eve", "--quiet").strip()
    for name in ("events", "tasks"):
        for path in (eve.lattice / name).glob("task_*"):
            path.write_bytes(b"damaged\n")
    eve.ok("comment", task, "x", "--actor", "human:eve")
    assert eve.is_equal


def test_the_client_follows_a_new_epoch_and_a_killed_server(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    eve = Standalone(server, "eve")
    eve.ok("create", "Before", "--actor", "human:eve")
    epoch = eve.position["epoch"]
    with eve.following():
        server.kill()
        server.start()
        eve.becomes_equal()
        server.stop()
        shutil.rmtree(server.lattice_dir().parent / "journal")
        (server.lattice_dir() / "context.md").unlink()
        server.start()
        wait_for(lambda: eve.is_equal and eve.position["epoch"] not in ("", epoch), "the new epoch")
    eve.ok("create", "After", "--actor", "human:eve")
    assert eve.is_equal


def test_the_smallest_part_is_a_correct_client(shared_board: Board, tmp_path: Path) -> None:
    server, ana, _ben = shared_board
    tree = standalone_client.Tree(tmp_path / "files", tmp_path / "new")
    tree["tasks/of-another-project.json"] = b"{}"
    task = ana.ok("create", "Smallest", "--actor", "human:ana", "--quiet").strip()
    client = standalone_client.Smallest(tree)
    token, url = server.token("human:eli"), f"ws{server.url.removeprefix('http')}/projects/board/ws"
    for _ in range(2):
        headers = {"Authorization": f"Bearer {token}"}
        with connect(
            url, subprotocols=[Subprotocol("lattice.v1")], additional_headers=headers, max_size=2**25
        ) as connection:
            sends, argvs = client.connected(), [["comment", task, "x"], ["archive", task], ["unarchive", task]]
            while sends or argvs or differences(tmp_path / "files", server.lattice_dir()):
                for frame in sends:
                    connection.send(msgspec.msgpack.encode(frame))
                if client.welcome and not client.missing and client.later is None and argvs:
                    ana.ok(*argvs.pop(0), "--actor", "human:ana")
                sends = client.receive(standalone_client.decode(connection.recv(timeout=20)))
        client.lost()
