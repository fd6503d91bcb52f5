"""Errors are one line with the next step, exit 1, and lattice's envelope under --json."""

import json
import subprocess
from pathlib import Path

import pytest

from sandbox import BIN, Client, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]


def failing(client: Client, *argv: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    """Run a failing command in both formats; return the code and the human line."""
    human = client.run(*argv, env=env)
    assert human.returncode == 1, (human.stdout, human.stderr)
    assert human.stdout == ""
    lines = human.stderr.strip().splitlines()
    assert len(lines) == 1, human.stderr
    assert lines[0].startswith("Error: ")
    machine = client.run(*argv, "--json", env=env)
    assert machine.returncode == 1
    envelope = json.loads(machine.stdout)
    assert envelope["ok"] is False
    assert "Traceback" not in human.stderr + machine.stderr
    return envelope["error"]["code"], lines[0]


COMMENT = ("comment", "LAT-1", "x", "--actor", "human:ana")


@pytest.fixture(scope="module", autouse=True)
def one_task(shared_board: Board) -> None:
    shared_board[1].ok("create", "One", "--actor", "human:ana")


def test_a_wrong_token_is_unauthorized(shared_board: Board) -> None:
    code, line = failing(shared_board[1], *COMMENT, env={"LATTICE_TOKEN": "ltr_wrong"})
    assert "LATTICE_TOKEN" in line
    assert code == "REMOTE_UNAUTHORIZED"
    assert "login" in line


def test_a_token_for_another_project_is_forbidden(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    server.admin("project", "create", "other", "--code", "OTH")
    token = server.token("human:ana", slug="other")
    code, _line = failing(ana, *COMMENT, env={"LATTICE_TOKEN": token})
    assert code == "REMOTE_FORBIDDEN"


def test_another_actor_is_forbidden_and_the_error_names_the_allowed_ones(shared_board: Board) -> None:
    code, line = failing(shared_board[1], "comment", "LAT-1", "x", "--actor", "human:ben")
    assert code == "REMOTE_FORBIDDEN"
    assert "human:ana" in line
    assert "agent:*" in line


def test_an_unknown_project_is_not_found(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    client = ana.elsewhere(ana.dir.parent / "unknown")
    token = server.token("human:x")
    done = client.run("remote", "add", "origin", server.url, "--project", "nowhere", "--token", token)
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(client.dir.iterdir()) == []


@pytest.mark.parametrize(
    "argv",
    [
        ("session", "end", "../config"),
        ("session", "end", "index"),
        ("session", "end", "../../../etc/passwd"),
        ("resource", "create", "../../escaped", "--actor", "human:ana"),
        ("resource", "create", "a/b", "--actor", "human:ana"),
        ("comment", "LAT-1", "x", "--name", "../config"),
        ("rebuild", "../../other/.lattice/events/x"),
        ("create", "x", "--id", "../../x", "--actor", "human:ana"),
    ],
)
def test_hostile_names_are_refused_and_the_project_stays_intact(shared_board: Board, argv: tuple[str, ...]) -> None:
    """I9."""
    server, ana, _ben = shared_board
    before, outside = tree_of(server.lattice_dir()), sorted(server.data.rglob("*"))
    done = ana.run(*argv)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert tree_of(server.lattice_dir()) == before
    assert {p for p in server.data.rglob("*") if "journal" not in p.parts and "tmp" not in p.parts} <= set(outside)
    assert ana.run("doctor").returncode == 0


def test_demo_is_refused_in_a_cache(shared_board: Board) -> None:
    server, ana, _ben = shared_board
    before = tree_of(server.lattice_dir())
    done = ana.run("demo", "init", "--no-dashboard", "--path", str(ana.dir))
    assert done.returncode == 1 and "already exists" in done.stderr
    assert tree_of(ana.lattice_dir) == tree_of(server.lattice_dir()) == before


def test_a_missing_token_is_reported_with_how_to_log_in(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    token = server.token("human:ana")
    client = sandbox.client("ana")
    refused = client.run("remote", "add", "origin", server.url + "/board")
    assert refused.returncode == 1
    assert "login" in refused.stderr or "--token" in refused.stderr
    assert not client.lattice_dir.exists()
    assert client.run("remote", "login", server.url, stdin=token + "\n").returncode == 0
    client.ok("remote", "add", "origin", server.url + "/board")
    assert "board" in client.ok("remote", "-v")
    client.ok("remote", "logout")
    code, line = failing(client, "comment", "LAT-1", "x", "--actor", "human:ana")
    assert code == "REMOTE_UNAUTHORIZED"
    assert "login" in line


def test_without_a_connection_reads_report_their_age_and_writes_fail(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "Before", "--actor", "human:ana")
    before = tree_of(ana.lattice_dir)
    server.stop()
    read = ana.run("list")
    assert read.returncode == 0
    assert "Before" in read.stdout
    assert len(read.stderr.strip().splitlines()) == 1
    assert "cannot reach server" in read.stderr
    assert "ago" in read.stderr
    for env in ({}, {"LATTICE_REMOTE_AGENT": "off"}):
        code, line = failing(ana, *COMMENT, env=env)
        assert code == "REMOTE_UNREACHABLE"
        assert "cannot reach server" in line
    assert tree_of(ana.lattice_dir) == before
    server.start()
    ana.ok(*COMMENT)
    assert ana.ok("comments", "LAT-1").count("x") >= 1
    assert differences(ana.lattice_dir, server.lattice_dir()) == []


def test_a_revoked_token_loses_its_connection(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    token = server.token("human:ana")
    ana.add_remote(server, token)
    ana.ok("create", "Before", "--actor", "human:ana")
    server.admin("token", "revoke", token)
    wait_for(lambda: ana.run(*COMMENT).returncode == 1, "the refusal")
    code, line = failing(ana, *COMMENT)
    assert code == "REMOTE_UNAUTHORIZED"
    assert "login" in line
    read = ana.run("list")
    assert "Before" in read.stdout
    assert read.stderr.strip()


def test_admin_errors_are_one_line(sandbox: Sandbox, tmp_path: Path) -> None:
    server = sandbox.started_server()
    env = sandbox.environment("admin")
    for argv in (
        ("start", "--data", str(tmp_path / "nothing"), "--port", "0"),
        ("start", "--data", str(server.data), "--port", "0"),
        ("project", "create", "board", "--code", "LAT", "--data", str(server.data)),
        ("project", "create", "Bad Slug", "--code", "LAT", "--data", str(server.data)),
        ("token", "create", "--project", "nowhere", "--actor", "human:x", "--data", str(server.data)),
        ("token", "revoke", "tok_nothing", "--data", str(server.data)),
        ("init", str(server.data)),
    ):
        done = subprocess.run(
            [BIN / "lattice-remote", *argv], env=env, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 1, (argv, done)
        assert len(done.stderr.strip().splitlines()) == 1, (argv, done.stderr)
        assert done.stdout == ""


def test_only_hashes_of_tokens_are_stored(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.project()
    token = server.token("human:ana", "agent:*")
    stored = (server.data / "tokens.json").read_text()
    assert token not in stored
    assert token.removeprefix("ltr_") not in stored
    assert (server.data / "tokens.json").stat().st_mode & 0o777 == 0o600
    listed = json.loads(server.admin("token", "list", "--json"))
    assert token not in json.dumps(listed)
    assert "agent:*" in json.dumps(listed)
