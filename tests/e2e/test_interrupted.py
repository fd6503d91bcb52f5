"""Ctrl-C at any moment of a write or a fill: nothing is damaged, and the next command continues."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sandbox import Client, Server, differences, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]


def interrupt(client: Client, *argv: str, after_s: float, off: bool) -> tuple[int, str]:
    """Start a command, send it Ctrl-C a while after it opens a socket, and return its exit code and stderr."""
    process = client.popen(*argv, env={"LATTICE_REMOTE_AGENT": "off"} if off else None)
    wait_for(lambda: process.poll() is not None or talks(process.pid), "the command to talk to somebody")
    try:
        process.wait(timeout=after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def talks(pid: int) -> bool:
    """Report whether a process has a socket."""
    with contextlib.suppress(OSError):
        return any(os.readlink(place).startswith("socket:") for place in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.parametrize("off", [False, True], ids=["with the agent", "without"])
def test_an_interrupted_write_runs_once_or_not_at_all(shared_board: Board, off: bool) -> None:
    server, ana, _ben = shared_board
    task = ana.ok("create", "Interrupted", "--actor", "human:ana", "--quiet").strip()
    acknowledged = []
    for n in range(5):
        word = f"word{n}{'x' if off else 'y'}"
        code, _ = interrupt(
            ana, "comment", task, word, "--actor", "human:ana", after_s=n * (0.08 if off else 0.004), off=off
        )
        if not code:
            acknowledged.append(word)
    said = ana.ok("comments", task)
    assert all(said.count(f"word{n}") <= 1 for n in range(5))
    assert all(said.count(word) == 1 for word in acknowledged)
    assert ana.ok("comment", task, "after all", "--actor", "human:ana")
    wait_for(lambda: not differences(ana.lattice_dir, server.lattice_dir()), "the files to be the server's")


@pytest.mark.parametrize("off", [False, True], ids=["with the agent", "without"])
def test_an_interrupted_fill_is_continued(shared_board: Board, off: bool) -> None:
    server, ana, _ben = shared_board
    for n in range(3):
        clone = ana.elsewhere(ana.dir.parent / f"interrupted-{n}-{off}")
        clone.lattice_dir.mkdir()
        (clone.lattice_dir / "remote.json").write_bytes((ana.lattice_dir / "remote.json").read_bytes())
        interrupt(clone, "list", after_s=n * 0.05, off=off)
        done = clone.run("list", env={"LATTICE_REMOTE_AGENT": "off"} if off else None)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ana.ok("list")
        assert differences(clone.lattice_dir, server.lattice_dir()) == []
