"""The main use: writes reach the other machine, and messages name the next step."""

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sandbox import BIN, Client, Programs, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]


def plan_of(client: Client, short_id: str) -> Path:
    task = json.loads(client.ok("show", short_id, "--json"))["data"]["id"]
    return client.lattice_dir / "plans" / f"{task}.md"


def answer(client: Client, *argv: str) -> dict[str, Any]:
    return dict(json.loads(client.ok(*argv, "--json"))["data"])


def new_task(client: Client, title: str) -> str:
    return client.ok("create", title, "--actor", "human:ana", "--quiet").strip()


def test_a_created_task_reaches_the_other_client(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    task = new_task(ana, "Seen by ben")
    wait_for(lambda: "Seen by ben" in ben.ok("list"), "the task in ben's list")
    ben.ok("comment", task, "I see it", "--actor", "human:ben")
    wait_for(lambda: "I see it" in ana.ok("comments", task), "ben's comment in ana's copy")


def test_a_write_is_in_the_files_when_its_command_returns(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    for n in range(5):
        task = new_task(ana, f"Own write {n}")
        assert plan_of(ana, task).is_file()


def test_an_edited_plan_permits_the_start_and_reaches_all_clients(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    task = new_task(ana, "With a plan")
    for status in ("in_planning", "planned"):
        ana.ok("status", task, status, "--actor", "human:ana")
    assert ana.run("status", task, "in_progress", "--actor", "human:ana").returncode == 1
    plan = plan_of(ana, task)
    plan.write_text(plan.read_text() + "\n## Steps\n\n- do it\n")
    ana.ok("status", task, "in_progress", "--actor", "human:ana")
    ben.ok("remote", "pull")
    assert plan_of(ben, task).read_text() == plan.read_text()


def test_notes_made_by_hand_are_sent_by_push_without_an_agent(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    task = new_task(ana, "With notes")
    notes = ana.lattice_dir / "notes" / plan_of(ana, task).name
    ana.ok("remote", "agent", "stop")
    notes.write_text("# Notes\n\nwritten by hand, ünïcode\n")
    off = {"LATTICE_REMOTE_AGENT": "off"}
    assert f"notes/{notes.name}" in ana.run("remote", "status", "--json", env=off).stdout
    assert notes.name in ana.run("remote", "push", env=off).stdout
    ben.ok("remote", "pull")
    assert (ben.lattice_dir / "notes" / notes.name).read_text() == notes.read_text()


def test_edits_of_two_users_in_different_places_are_merged(shared_board: Board) -> None:
    _server, ana, ben = shared_board
    task = new_task(ana, "Merged")
    lines = [f"line {n}" for n in range(20)]
    plan = plan_of(ana, task)
    plan.write_text("\n".join(lines) + "\n")
    ana.ok("remote", "push")
    ben.ok("remote", "pull")
    theirs = plan_of(ben, task)
    plan.write_text(plan.read_text().replace("line 2\n", "line 2, by ana\n"))
    theirs.write_text(theirs.read_text().replace("line 17\n", "line 17, by ben\n"))
    ana.ok("remote", "push")
    ben.ok("remote", "push")
    ana.ok("remote", "pull")
    assert "line 2, by ana\n" in theirs.read_text()
    assert "line 17, by ben\n" in theirs.read_text()
    assert plan.read_bytes() == theirs.read_bytes()


def test_a_conflict_keeps_both_texts_once_and_is_reported(shared_board: Board) -> None:
    server, ana, ben = shared_board
    task = new_task(ana, "Conflict")
    ben.ok("remote", "pull")
    plan, theirs = plan_of(ana, task), plan_of(ben, task)
    ben.ok("remote", "agent", "stop")
    plan.write_text("# one\n\nana's text\n")
    theirs.write_text("# one\n\nben's text\n")
    ana.ok("remote", "push")
    said = ben.run("comment", task, "hello", "--actor", "human:ben")
    assert said.returncode == 0
    assert "conflict" in said.stderr.lower()
    assert theirs.read_text() == "# one\n\nana's text\n"
    kept = [path for path in (ben.lattice_dir / ".remote" / "conflicts").rglob("*") if path.is_file()]
    assert [path.read_text() for path in kept] == ["# one\n\nben's text\n"]
    assert list(theirs.parent.glob(f"{theirs.name}?*")) == [], "editors and tools see the texts alone"
    assert ben.run("comment", task, "again", "--actor", "human:ben").stderr.count("conflict:") == 1
    assert f"conflicts:      1: plan of {task}" in ben.ok("remote", "status")
    ben.ok("remote", "resolve", task, "--theirs")
    assert "conflict" not in ben.run("comment", task, "resolved", "--actor", "human:ben").stderr
    assert differences(ben.lattice_dir, server.lattice_dir()) == []


def test_a_plain_lattice_command_on_the_server_reaches_clients(shared_board: Board) -> None:
    """I12."""
    server, ana, ben = shared_board
    task = new_task(ana, "Behind its back")
    env = {k: v for k, v in ana.env.items() if not k.startswith("LATTICE")}
    subprocess.run(
        [BIN / "lattice", "comment", task, "over ssh", "--actor", "human:root"],
        cwd=server.lattice_dir().parent, env=env, check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    wait_for(lambda: "over ssh" in ben.ok("comments", task), "the comment in ben's copy")


def test_a_directory_without_a_remote_behaves_as_without_the_package(sandbox: Sandbox) -> None:
    plain = sandbox.client("plain")
    plain.ok("init", "--project-code", "LOC", "--actor", "human:me", "--no-setup-agents", "--no-setup-claude")
    assert "LOC-1" in plain.ok("create", "Local", "--actor", "human:me")
    before = tree_of(plain.lattice_dir)
    assert plain.ok("remote") == ""  # as git does
    assert tree_of(plain.lattice_dir) == before
    assert not (plain.lattice_dir / "cache_state.json").exists()


def test_adding_a_remote_with_an_unknown_token_is_refused_and_changes_nothing(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    mine = ana.elsewhere(ana.dir.parent / "mine")
    mine.ok("init", "--project-code", "OWN", "--actor", "human:me", "--no-setup-agents", "--no-setup-claude")
    mine.ok("create", "My own", "--actor", "human:me")
    before = {path: path.read_bytes() for path in mine.lattice_dir.rglob("*") if path.is_file()}
    refused = mine.run("remote", "add", "origin", server.url, "--project", "board", "--token", "x")
    assert refused.returncode == 1
    assert "missing or unknown token" in refused.stderr
    assert {path: path.read_bytes() for path in mine.lattice_dir.rglob("*") if path.is_file()} == before
    assert "OWN-2" in mine.ok("create", "Still local", "--actor", "human:me")


def test_the_token_is_stored_per_user_and_never_in_the_project(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    tokens = Path(ana.env["XDG_CONFIG_HOME"]) / "lattice" / "tokens.json"
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    secret = json.dumps(json.loads(tokens.read_text())).split("ltr_")[1].split('"')[0]
    for path in ana.dir.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_everything_works_without_the_agent(shared_board: Board) -> None:
    server, ana, ben = shared_board
    off = {"LATTICE_REMOTE_AGENT": "off"}
    done = ben.run("create", "Direct", "--actor", "human:ben", "--quiet", env=off)
    assert done.returncode == 0, done.stderr
    task = done.stdout.strip()
    assert "Direct" in ben.run("show", task, env=off).stdout
    wait_for(lambda: "Direct" in ana.ok("list"), "the task in ana's list")
    assert differences(ben.lattice_dir, server.lattice_dir()) == []


def test_the_next_command_replaces_agents_of_a_killed_machine(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    pid = answer(ana, "remote", "agent", "status")["pid"]
    os.kill(pid, 9)
    task = new_task(ana, "After the agent was killed")
    assert answer(ana, "remote", "agent", "status")["pid"] != pid
    assert plan_of(ana, task).is_file()


def test_changes_of_files_by_other_programs_are_repaired_without_a_request(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    task = plan_of(ana, new_task(ana, "Altered")).stem
    ana.ok("remote", "pull")
    with (ana.lattice_dir / "events" / f"{task}.jsonl").open("a") as log:
        log.write("{}\n")
    (ana.lattice_dir / "tasks" / f"{task}.json").write_text("{}\n")
    (ana.lattice_dir / "tasks" / "task_foreign.json").write_text("{}\n")
    (ana.lattice_dir / "context.md").write_text("# Written by hand\n")
    (ana.lattice_dir / "ids.json").unlink()
    shutil.rmtree(ana.lattice_dir / "plans")
    wait_for(lambda: not differences(ana.lattice_dir, server.lattice_dir()), "the files to be the server's again")
    wait_for(lambda: answer(ana, "remote", "status")["repaired"]["count"] >= 6, "status to count it")
    kept = [place.read_text() for place in ana.lattice_dir.glob(".remote/rescued/*/files/context.md")]
    assert kept == ["# Written by hand\n"]
    assert "see: lattice remote rescued" in ana.ok("remote", "status")
    ana.ok("remote", "rescued", "drop", "--all")


def test_without_the_agent_verify_reports_and_sync_repairs(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    task = plan_of(ana, new_task(ana, "Altered")).stem
    ana.ok("remote", "agent", "stop")
    off = {"LATTICE_REMOTE_AGENT": "off"}
    snapshot = ana.lattice_dir / "tasks" / f"{task}.json"
    snapshot.write_text("{}\n")
    (ana.lattice_dir / "ids.json").unlink()
    verified = ana.run("remote", "verify", env=off)
    assert verified.returncode == 1
    assert snapshot.name in verified.stdout + verified.stderr
    assert snapshot.read_text() == "{}\n"
    assert snapshot.name in ana.run("remote", "sync", env=off).stdout
    assert ana.run("remote", "verify", env=off).returncode == 0
    assert differences(ana.lattice_dir, server.lattice_dir()) == []


def test_files_changed_without_an_agent_are_repaired_by_the_next_one(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    ana.ok("remote", "agent", "stop")
    (ana.lattice_dir / "ids.json").write_text("{}\n")
    ana.ok("list")
    wait_for(lambda: not differences(ana.lattice_dir, server.lattice_dir()), "the files to be the server's again")


def test_status_states_its_evidence(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    ana.ok("list")
    assert answer(ana, "remote", "status")["connected"] is True
    text = ana.ok("remote", "status")
    assert "connected" in text
    assert str(os.getpid()) not in text


@pytest.mark.parametrize(
    ("argv", "used", "unused"),
    [
        (("remote", "status"), "cli.common", {"asyncio", "msgspec", "lattice_remote.client.cache.cache"}),
        (("remote", "-v"), "cli.common", {"asyncio", "msgspec", "lattice_remote.client.cache.cache"}),
        (("comment", "TASK", "x", "--actor", "human:ana"), "routing", {"asyncio", "lattice_remote.client.guard"}),
        (("list",), "guard", {"asyncio", "msgspec", "typer"}),
    ],
)
def test_a_frequent_command_loads_only_its_own_modules(
    shared_board: Board, argv: tuple[str, ...], used: str, unused: set[str]
) -> None:
    _server, ana, _ben = shared_board
    words = [new_task(ana, "Light") if word == "TASK" else word for word in argv]
    done = ana.run(*words, env={"PYTHONPROFILEIMPORTTIME": "1"}, programs=Programs())
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert done.returncode == 0 and f"lattice_remote.client.{used}" in loaded
    assert loaded.isdisjoint({"pydantic", "rich", "watchfiles", "websockets", *unused})


def test_git_sees_only_remote_json(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    subprocess.run(["git", "init", "-q"], cwd=ana.dir, env=ana.env, check=True)
    listed = subprocess.run(
        ["git", "status", "--porcelain", "-uall", "--", ".lattice"],
        cwd=ana.dir, env=ana.env, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    assert {line[3:] for line in listed if line} <= {".lattice/remote.json", ".lattice/.gitignore"}
    assert "?? .lattice/remote.json" in listed


def test_after_git_clone_the_first_command_fills_the_cache(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    clone = ana.elsewhere(ana.dir.parent / "clone")
    clone.lattice_dir.mkdir(parents=True)
    (clone.lattice_dir / "remote.json").write_bytes((ana.lattice_dir / "remote.json").read_bytes())
    assert clone.ok("list") == ana.ok("list")
    assert differences(clone.lattice_dir, server.lattice_dir()) == []
