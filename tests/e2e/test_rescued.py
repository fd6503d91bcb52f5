"""Writes of other programs to a cache are reverted, rescued, and can be applied on the server (I4)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sandbox import Client, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]
PLAIN = {"LATTICE_REMOTE_SERVER": "1"}
"""The environment of lattice without our plugin."""
MINE = ("--actor", "human:ana")


@pytest.fixture(autouse=True)
def nothing_rescued(shared_board: Board) -> None:
    shared_board[1].ok("remote", "rescued", "drop", "--all")


def new_task(client: Client, title: str) -> str:
    return client.ok("create", title, *MINE, "--quiet").strip()


def write_into(
    client: Client, tmp_path: Path, *commands: tuple[str, ...], new_plan: str | None = None
) -> dict[str, bytes]:
    """Write to a cache as plain lattice writes to the same files; return the written text by path."""
    client.ok("remote", "pull")
    other = client.elsewhere(tmp_path / "plain")
    shutil.copytree(client.lattice_dir, other.lattice_dir, ignore=shutil.ignore_patterns(".*", "*.json.lock", "locks"))
    for name in ("remote.json", "cache_state.json"):
        (other.lattice_dir / name).unlink()
    (other.lattice_dir / "locks").mkdir()
    before = tree_of(other.lattice_dir)
    for argv in commands:
        done = other.run(*argv, env=PLAIN)
        assert done.returncode == 0, done.stderr
    if new_plan is not None:
        (plan,) = (path for path in tree_of(other.lattice_dir).keys() - before.keys() if path.startswith("plans/"))
        (other.lattice_dir / plan).write_text(new_plan)
    written = {path: data for path, data in tree_of(other.lattice_dir).items() if before.get(path) != data}
    for path in sorted(written):
        place = client.lattice_dir / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(written[path])
    return written


def restored(server: Server, client: Client) -> None:
    wait_for(lambda: not differences(server.lattice_dir(), client.lattice_dir), "the copy to be the server's again")


def entries(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(client.ok("remote", "rescued", "--json"))["data"]["entries"]
    return found


def test_a_comment_is_rescued_listed_shown_and_applied(shared_board: Board, tmp_path: Path) -> None:
    server, ana, ben = shared_board
    task = new_task(ana, "Beside the server")
    written = write_into(ana, tmp_path, ("comment", task, "straight into the copy", *MINE))
    restored(server, ana)
    (entry,) = entries(ana)
    assert set(entry["files"]) == set(written)
    for path, data in written.items():
        assert (ana.lattice_dir / f".remote/rescued/{entry['number']}/files/{path}").read_bytes() == data
    for _ in range(2):
        listed = ana.run("list")
        assert f"lattice remote rescued show {entry['number']}" in listed.stderr and listed.returncode == 0
    shown = ana.ok("remote", "rescued", "show", str(entry["number"]))
    assert "straight into the copy" in shown and "comment_added" in shown
    assert ana.ok("remote", "rescued", "apply", "--all").splitlines() == [
        f"applied: comment_added to {task}",
        "Applied 1, refused 0.",
        f"Dropped {entry['number']}: the server lacks nothing of it.",
    ]
    ben.ok("remote", "pull")
    assert ben.ok("comments", task).count("straight into the copy") == 1
    assert entries(ana) == [] and "rescued" not in ana.run("list").stderr
    restored(server, ana)


def test_a_new_task_gets_its_events_its_plan_and_the_servers_number(shared_board: Board, tmp_path: Path) -> None:
    server, ana, ben = shared_board
    ana.ok("remote", "pull")
    written = write_into(
        ana,
        tmp_path,
        ("create", "Made without the server", "--description", "all of it", *MINE),
        ("resource", "create", "printer", *MINE),
        new_plan="# My plan\n\n- a step\n",
    )
    (plan,) = (path for path in written if path.startswith("plans/"))
    taken = ben.ok("create", "Takes the number meanwhile", "--actor", "human:ben", "--quiet").strip()
    restored(server, ana)
    assert "Made without" not in ana.ok("list")
    done = json.loads(ana.ok("remote", "rescued", "apply", "--all", "--json"))["data"]
    assert done["refused"] == []
    assert sorted(each["type"] for each in done["applied"]) == ["plan", "resource_created", "task_created"]
    made = next(each["to"] for each in done["applied"] if each["type"] == "task_created")
    assert made != taken
    ben.ok("remote", "pull")
    assert json.loads(ben.ok("show", made, "--json"))["data"]["title"] == "Made without the server"
    assert (ben.lattice_dir / plan).read_text() == "# My plan\n\n- a step\n"
    assert "printer" in ben.ok("resource", "list")
    assert entries(ana) == []
    restored(server, ana)


def test_an_attached_file_is_rescued_with_its_description(shared_board: Board, tmp_path: Path) -> None:
    server, ana, _ben = shared_board
    task = new_task(ana, "Attach beside the server")
    attached = tmp_path / "figures.csv"
    attached.write_text("1,2,3\n")
    written = write_into(ana, tmp_path, ("attach", task, str(attached), *MINE))
    (payload,) = (path for path in written if path.startswith("artifacts/payload/"))
    restored(server, ana)
    wait_for(lambda: payload in (path for entry in entries(ana) for path in entry["files"]), "it to be kept")
    entry = next(entry for entry in entries(ana) if payload in entry["files"])
    assert (ana.lattice_dir / f".remote/rescued/{entry['number']}/files/{payload}").read_text() == "1,2,3\n"


def test_a_refusal_of_the_server_is_reported_and_keeps_the_text(shared_board: Board, tmp_path: Path) -> None:
    server, ana, _ben = shared_board
    task = new_task(ana, "Refused")
    write_into(
        ana,
        tmp_path,
        ("comment", task, "in another name", "--actor", "human:carla"),
        ("comment", task, "in my own", *MINE),
        ("session", "start", "--name", "Rescued", "--model", "m", "--framework", "f"),
    )
    restored(server, ana)
    wait_for(lambda: sum(len(each["files"]) for each in entries(ana)) >= 4, "all that was written")
    for _ in range(2):
        done = ana.run("remote", "rescued", "apply", "--all")
        assert done.returncode == 1
        assert "refused: events/task_" in done.stdout and "human:carla" in done.stdout
        assert "refused: sessions/Rescued-1.json: only " in done.stdout
    restored(server, ana)
    assert ana.ok("comments", task).count("in my own") == 1 and "in another name" not in ana.ok("comments", task)
    assert entries(ana), "it is kept until it is dropped"
    ana.ok("remote", "rescued", "drop", "--all")
    assert entries(ana) == [] and not list((ana.lattice_dir / ".remote/rescued").iterdir())


WRITES = (
    ("create", "Lost", *MINE),
    ("comment", "TASK", "lost", *MINE),
    ("status", "TASK", "in_planning", *MINE),
    ("assign", "TASK", "human:ana", *MINE),
    ("archive", "TASK", *MINE),
    ("resource", "create", "lost", *MINE),
    ("session", "start", "--name", "Lost", "--model", "m", "--framework", "f"),
    ("rebuild", "--all"),
    ("doctor", "--fix"),
)
READS = (
    ("list",),
    ("show", "TASK"),
    ("comments", "TASK"),
    ("stats",),
    ("weather",),
    ("next",),
    ("doctor",),
    ("plan", "TASK"),
)


def test_lattice_without_our_plugin_reads_and_cannot_write(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    task = new_task(ana, "For everybody to see")
    ana.ok("remote", "pull")
    before = tree_of(ana.lattice_dir)
    for words in WRITES:
        done = ana.run(*(task if word == "TASK" else word for word in words), env=PLAIN)
        if words == ("doctor", "--fix"):
            assert done.returncode == 0, "it finds nothing to fix"
            continue
        assert done.returncode == 1, words
        assert "locks" in f"{done.stdout}{done.stderr}" or "locks" in repr(done), words
    for words in READS:
        line = tuple(task if word == "TASK" else word for word in words)
        plain, ours = ana.run(*line, env=PLAIN), ana.run(*line)
        assert (plain.returncode, plain.stdout) == (ours.returncode, ours.stdout), words
    assert tree_of(ana.lattice_dir) == before == tree_of(server.lattice_dir())
    assert "pip install lattice-remote" in (ana.lattice_dir / "locks").read_text()
    assert entries(ana) == []


@pytest.mark.parametrize("how", ["removed", "a directory", "a directory with a lock", "a link"])
def test_the_write_barrier_against_plain_lattice_is_restored(shared_board: Board, how: str) -> None:
    _server, ana, _ben = shared_board
    ana.ok("list")
    locks = ana.lattice_dir / "locks"
    text = locks.read_text()
    locks.unlink()
    if how.startswith("a directory"):
        locks.mkdir()
    if how.endswith("lock"):
        (locks / "tasks_x.lock").touch()
    if how == "a link":
        locks.symlink_to("/tmp")
    wait_for(lambda: locks.is_file() and not locks.is_symlink() and locks.read_text() == text, "the file of locks")


def test_plain_lattice_can_write_to_a_cache_made_local(shared_board: Board, tmp_path: Path) -> None:
    server, ana, _ben = shared_board
    other = ana.elsewhere(tmp_path / "other")
    other.ok("remote", "add", "origin", f"{server.url}/board")
    assert (other.lattice_dir / "locks").is_file()
    other.ok("remote", "remove", "origin", "--keep-local")
    assert (other.lattice_dir / "locks").is_dir()
    assert "Created task" in other.run("create", "On my own", *MINE, env=PLAIN).stdout
    assert "Created task" in other.ok("create", "On my own, with the plugin", *MINE)
    assert "On my own" in other.ok("list") and "On my own" not in ana.ok("list")


def test_a_server_copied_from_a_cache_can_write(sandbox: Sandbox, tmp_path: Path) -> None:
    server = sandbox.server()
    server.project()
    locks = server.lattice_dir() / "locks"
    shutil.rmtree(locks)
    locks.write_text("This directory is a copy")
    server.start()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    assert new_task(ana, "Written") == "LAT-1"
    assert locks.is_dir()


def test_each_error_is_one_line(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    for words, said in (
        (("show", "77"), "no rescued files 77"),
        (("drop",), "name NUMBERs"),
        (("apply", "1", "--all"), "name NUMBERs"),
    ):
        done = ana.run("remote", "rescued", *words)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert ana.ok("remote", "rescued") == ana.ok("remote", "rescued", "list") == "No rescued files.\n"
