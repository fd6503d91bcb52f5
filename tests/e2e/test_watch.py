"""``lattice remote watch``: a terminal, a script, a command for each change; disconnects, resumption, and exit."""

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preloaded_programs import warm
from sandbox import BIN, Client, Sandbox, Server, wait_for
from watch_command import Watcher

pytestmark = pytest.mark.e2e

ANA = ("--actor", "human:ana")


@pytest.fixture(scope="module")
def people() -> Iterator[tuple[Server, Client, Client]]:
    """A server, a writing client Ana and a watching client Ben; each test starts at the previous one's last number."""
    with Sandbox(warm()) as sandbox:
        server = sandbox.started_server()
        ana, ben = sandbox.client("ana"), sandbox.client("ben")
        ana.add_remote(server, server.token("human:ana", "agent:*"))
        ben.add_remote(server, server.token("human:ben"))
        ana.ok("create", "Kept", *ANA)
        yield server, ana, ben


def head(client: Client) -> int:
    """Return the number of the last change."""
    return int(json.loads(client.ok("remote", "pull", "--json"))["data"]["seq"])


def resume_point(stderr: str) -> str:
    """Return the position for resuming from the last line of a watcher."""
    return stderr.splitlines()[-1].rpartition("--since ")[2]


def test_each_change_is_one_line_of_json_across_lost_connections(
    people: tuple[Server, Client, Client],
) -> None:
    server, ana, ben = people
    n = head(ana)
    one = json.loads(ana.ok("create", "One", "--json", *ANA))["data"]["short_id"]
    with Watcher(ben, "--since", str(n)) as watcher:
        ana.ok("comment", one, "\x1b[31mred", "--actor", "agent:bot")
        ana.ok("resource", "create", "gpu", *ANA)
        task = json.loads(ana.ok("show", one, "--json"))["data"]["id"]
        plan = ana.lattice_dir / "plans" / f"{task}.md"
        plan.write_text(plan.read_text() + "\nMore.\n")
        ana.ok("remote", "push")
        server.kill()
        server.start()
        ana.ok("status", one, "in_planning", *ANA)
        ana.ok("archive", one, *ANA)
        wait_for(lambda: len(watcher.records) >= 6, f"six changes: {watcher.said}")
        assert watcher.end() == 130
    records = watcher.records
    assert [record["seq"] for record in records] == list(range(n + 1, n + 7))
    log = json.loads(ana.ok("remote", "log", "-n", "6", "--json"))["data"]["entries"]
    for told, logged in zip(records, reversed(log), strict=True):
        same = ("seq", "epoch", "time", "actor", "token_actor", "token_id", "cause", "command")
        assert {key: told[key] for key in same} == {key: logged[key] for key in same}
        assert [task["id"] for task in told["tasks"]] == [task["id"] for task in logged["tasks"]]
    kinds = [[event["type"] for event in record["events"]] for record in records]
    assert kinds == [
        ["task_created"],
        ["comment_added"],
        ["resource_created"],
        [],
        ["status_changed"],
        ["task_archived"],
    ]
    assert records[1]["events"][0]["data"]["body"] == "\x1b[31mred" and records[1]["token_actor"] == "human:ana"
    assert records[1]["tasks"][0]["title"] == "One" and records[1]["tasks"][0]["short_id"] == one
    assert records[2]["resources"] == ["gpu"] and records[3]["plans"] == [records[0]["tasks"][0]["id"]]
    assert records[5]["plans"] == [], "a plan that goes to the archive is not written"

    again = ben.run("remote", "watch", "--json", "--since", str(n + 4), "-n", "2")
    assert again.returncode == 0
    assert [json.loads(line)["seq"] for line in again.stdout.splitlines()] == [n + 5, n + 6]
    assert resume_point(again.stderr) == records[5]["position"]
    of_task = ben.run("remote", "watch", "--task", one, "--since", str(n + 1), "-n", "2", "--json")
    assert [json.loads(line)["seq"] for line in of_task.stdout.splitlines()] == [n + 2, n + 4]


def test_a_position_before_the_retention_has_its_own_exit_code(people: tuple[Server, Client, Client]) -> None:
    _, ana, ben = people
    n = head(ana)
    ahead = ben.run("remote", "watch", "--since", str(n + 7))
    assert ahead.returncode == 3
    assert ahead.stderr == f"Error: there is no change {n + 7} yet, the last is {n}: resume with --since {n}\n"
    other = ben.run("remote", "watch", "--since", "abc-1-00", "--json")
    assert other.returncode == 3 and json.loads(other.stdout)["error"]["code"] == "REMOTE_GONE"
    assert ben.run("remote", "watch", "--since", "x").returncode == 1
    assert "there is no task 'LAT-99'" in ben.run("remote", "watch", "--task", "LAT-99").stderr


def test_a_command_runs_for_each_change_in_order_one_at_a_time_and_after_a_failure(
    people: tuple[Server, Client, Client], tmp_path: Path
) -> None:
    _, ana, ben = people
    out, n = tmp_path / "out", head(ana)
    for count in range(4):
        ana.ok("create", f"Task {count}", *ANA)
    # The command prints a line at its start and at its end, and fails once; lines of two runs must not mix.
    script = (
        f'echo "begin $LATTICE_CHANGE" >> {out}; grep -c "\\"seq\\": $LATTICE_CHANGE" >> {out}; sleep 0.1; '
        f'echo "end $LATTICE_CHANGE" >> {out}; test "$LATTICE_CHANGE" != {n + 2}'
    )
    done = ben.run("remote", "watch", "--exec", script, "--since", str(n), "-n", "4")
    assert done.returncode == 0 and done.stdout == ""
    assert out.read_text().splitlines() == [
        line for each in range(n + 1, n + 5) for line in (f"begin {each}", "1", f"end {each}")
    ]
    assert f"lattice-remote: change {n + 2}: the command ended with 1" in done.stderr.splitlines()
    slow = ben.run("remote", "watch", "--exec", "sleep 30", "--exec-timeout", "0.2", "--since", str(n + 3), "-n", "1")
    assert slow.returncode == 0 and f"change {n + 4}: the command took longer than 0.2 s and was ended" in slow.stderr


def test_ctrl_c_stops_the_running_command_and_prints_the_position_to_resume(
    people: tuple[Server, Client, Client], tmp_path: Path
) -> None:
    _, ana, ben = people
    pid, n = tmp_path / "pid", head(ana)
    for count in range(2):
        ana.ok("create", f"Task {count}", *ANA)
    slow = f"test $LATTICE_CHANGE = {n + 1} || {{ echo $$ > {pid}; sleep 60; }}"
    process = ben.popen("remote", "watch", "--exec", slow, "--since", str(n))
    wait_for(lambda: pid.exists() and pid.read_text().strip(), "the command to run")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert f"-{n + 1}-" in resume_point(stderr), "the second was not done with"
    wait_for(lambda: not Path(f"/proc/{int(pid.read_text())}").exists(), "the command to have ended")


def test_a_terminal_gets_a_view_and_texts_of_others_cannot_control_it(
    people: tuple[Server, Client, Client],
) -> None:
    _, ana, ben = people
    n = head(ana)
    ana.ok("create", "One \x1b[2J [bold]", *ANA)
    plain = ben.run("remote", "watch", "--since", str(n), "-n", "1").stdout
    assert plain.startswith(f"{n + 1:5}  ") and r" One \x1b[2J [bold]  create" in plain and "\x1b" not in plain
    ours, theirs = pty.openpty()
    argv = [BIN / "lattice", "remote", "watch", "--since", str(n), "-n", "1"]
    env = {**ben.env, "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(argv, cwd=ben.dir, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed: the watcher has exited
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert (
        f"watching after change {n}".encode() in shown and rb" One \x1b[2J [bold]" in shown and b"\x1b[2J" not in shown
    )


def test_a_closed_reader_ends_the_watcher_without_a_traceback(people: tuple[Server, Client, Client]) -> None:
    _, ana, ben = people
    n = head(ana)
    ana.ok("create", "Another", *ANA)
    command = f"{BIN}/lattice remote watch --json --since {n} | head -n 1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["/bin/sh", "-c", command], cwd=ben.dir, env=ben.env, **pipes)
    assert process.stdout is not None
    first = process.stdout.readline()
    deadline = time.monotonic() + 20
    while process.poll() is None:  # the watcher notices at the next change
        assert time.monotonic() < deadline
        ana.ok("comment", "LAT-1", "more", *ANA)
    _, err = process.communicate(timeout=20)
    assert json.loads(first)["seq"] == n + 1 and "Traceback" not in err
