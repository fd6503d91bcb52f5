"""Commands as a git user types them."""

import json
import os
from pathlib import Path

import pytest

from sandbox import Client, Sandbox, Server

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]


def test_the_remote_is_listed_shown_and_renamed(shared_board: Board) -> None:
    server, ana, _ = shared_board
    place = f"{server.url}/board"
    assert ana.ok("remote", "list") == f"origin\t{place}\n"
    assert ana.ok("remote", "get-url", "origin") == ana.ok("remote", "get-url") == f"{place}\n"
    assert json.loads(ana.ok("remote", "get-url", "--json"))["data"]["project"] == "board"
    assert ana.ok("remote", "rename", "origin", "team") == "origin is now called team.\n"
    wrong = ana.run("remote", "get-url", "origin")
    assert (wrong.returncode, wrong.stderr) == (1, "Error: no remote called 'origin' here; there is 'team'\n")
    assert ana.run("remote", "rename", "team", "../x").returncode == 1
    ana.ok("remote", "rename", "team", "origin")
    assert "has a remote already" in ana.run("remote", "add", "upstream", server.url, "--project", "board").stderr


@pytest.mark.parametrize("command", ["pull", "update", "push", "fetch"])
def test_git_style_commands_accept_the_remotes_name(shared_board: Board, command: str) -> None:
    _, ana, _ = shared_board
    ana.ok("remote", command, "origin")
    if command != "fetch":
        assert (
            ana.run("remote", command, "upstream").stderr
            == "Error: no remote called 'upstream' here; there is 'origin'\n"
        )


@pytest.mark.parametrize("command", ["pull", "push", "fetch", "log", "clone"])
def test_a_git_command_gets_a_hint_at_the_right_lattice_command(
    shared_board: Board, tmp_path: Path, command: str
) -> None:
    _, ana, _ = shared_board
    for client in (ana, ana.elsewhere(tmp_path)):
        done = client.run(command)
        assert done.returncode == 2
        assert f"No such command '{command}'. Did you mean: lattice remote {command}?" in done.stderr


def test_the_projects_of_a_token_are_listed_and_cloned_by_name(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.project("api", "API")
    server.project("web", "WEB")
    server.project("secret", "SEC")
    server.start()
    text = server.admin("token", "create", "--project", "web", "--project", "api", "--actor", "human:ana").strip()
    ana = sandbox.client("ana")
    assert "no token" in ana.run("remote", "projects", server.url).stderr
    said = ana.ok("remote", "login", server.url, stdin=f"{text}\n")
    assert "accepted, acting as human:ana; for api, web" in said
    assert [line.split("\t")[0] for line in ana.ok("remote", "projects", server.url).splitlines()] == ["api", "web"]
    found = json.loads(ana.ok("remote", "projects", server.url, "--json"))["data"]["projects"]
    assert [project["slug"] for project in found] == ["api", "web"]
    refused = ana.run("remote", "clone", server.url)
    assert refused.returncode == 1
    assert f"your token is for api, web; for example: {server.url}/api" in refused.stderr
    stored = Path(ana.env["XDG_CONFIG_HOME"], "lattice", "tokens.json").read_bytes()
    for typed, reason in (("ltr_wrong\n", f"{server.url} does not accept this token"), ("", "no token was given")):
        for place in (server.url, f"{server.url}/web"):
            wrong = ana.run("remote", "login", place, stdin=typed)
            assert wrong.returncode == 1 and wrong.stderr.startswith(f"Error: {reason}")
            assert wrong.stderr.count("\n") == 1 and "log in with" not in wrong.stderr
    assert Path(ana.env["XDG_CONFIG_HOME"], "lattice", "tokens.json").read_bytes() == stored
    for command in ("login", "projects", "trust", "logout"):
        nowhere = ana.run("remote", command)
        assert (nowhere.returncode, nowhere.stderr) == (
            1,
            "Error: no server is named, and there is no project here; name one: https://board.example.org\n",
        )
    ana.ok("remote", "clone", f"{server.url}/projects/web/dashboard?task=WEB-1#top")
    assert (ana.dir / "web" / ".lattice" / "remote.json").exists()
    assert "web\t" in ana.elsewhere(ana.dir / "web").ok("remote", "projects")


def test_a_trailing_slash_of_a_project_is_ignored(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    token, ana = server.token("human:ana"), sandbox.client("ana")
    below = ana.run("remote", "login", f"{server.url}/board/", stdin=f"{token}\n")
    assert below.returncode == 1 and below.stderr.startswith(f"Error: there is no server at {server.url}/board/; ")
    assert below.stderr.endswith("without the slash at its end the URL means project 'board'\n")
    ana.ok("remote", "login", server.url, stdin=f"{token}\n")
    ana.ok("remote", "clone", f"{server.url}/board/", str(ana.dir / "copy"))
    assert json.loads((ana.dir / "copy/.lattice/remote.json").read_text())["url"] == server.url
    assert "means project 'board'" in ana.run("remote", "clone", f"{server.url}/x/board/").stderr


def test_files_written_by_hand_suffice(sandbox: Sandbox) -> None:
    """``remote.json`` with URL and project, ``tokens.json`` with a token for each server."""
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    configuration = Path(ana.env["XDG_CONFIG_HOME"]) / "lattice"
    configuration.mkdir(parents=True, mode=0o700)
    tokens = configuration / "tokens.json"
    tokens.write_text(json.dumps({server.url: server.token("human:ana")}))
    tokens.chmod(0o600)
    ana.lattice_dir.mkdir()
    (ana.lattice_dir / "remote.json").write_text(json.dumps({"url": server.url, "project": "board"}))
    assert ana.ok("create", "One", "--actor", "human:ana")
    assert "One" in ana.ok("list")
    assert ana.ok("remote", "list") == f"origin\t{server.url}/board\n"
    ana.ok("remote", "login", f"{server.url}/board", stdin=f"{server.token('human:ana')}\n")
    assert "board" in json.loads(tokens.read_text())["tokens"][server.url]


def test_scripts_get_documented_exit_codes(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "One", "--actor", "human:ana")
    assert ana.run("remote", "status", "--exit-code").returncode == 0
    assert ana.ok("list", "--require-current") == ana.ok("list")
    assert "--require-current" in ana.ok("list", "--help")
    server.stop()
    assert ana.run("list").returncode == 0
    required = ana.run("list", "--require-current")
    assert (required.returncode, required.stdout) == (1, "")
    assert "cannot reach" in required.stderr
    assert json.loads(ana.run("list", "--require-current", "--json").stdout)["error"]["code"] == "REMOTE_UNREACHABLE"
    assert ana.run("remote", "status").returncode == 0
    assert ana.run("remote", "status", "--exit-code").returncode == 1
    server.start(*(["--port", str(server.port)] if server.port else []))
    (token,) = json.loads(server.admin("token", "list", "--json"))
    server.admin("token", "revoke", token["id"])
    assert os.path.exists(ana.lattice_dir)
    done = ana.run("remote", "status")
    assert done.returncode == 1, done.stdout
