"""Caches in git repositories and caches changed while no agent ran, with real commands (I4)."""

import json
import subprocess
from pathlib import Path

import pytest

from sandbox import Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]
MINE = ("--actor", "human:ana")


def git(place: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Ana", "-c", "user.email=ana@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=place, check=True, capture_output=True)


def new_plan(client: Client, title: str) -> tuple[str, Path]:
    short_id = client.ok("create", title, *MINE, "--quiet").strip()
    task = json.loads(client.ok("show", short_id, "--json"))["data"]["id"]
    return short_id, client.lattice_dir / "plans" / f"{task}.md"


TEXT = "# By Ben\n" + "\nA paragraph of his.\n" * 6
"""Ben's text of a plan after Ana's repository has tracked it."""


def share_tracked_plan(sandbox: Sandbox, tracked: str) -> tuple[Server, Client, Path, Path]:
    """Return the server, Ana's machine with the named files tracked by git, and the plan in her cache and Ben's."""
    server = sandbox.started_server()
    ana, ben = sandbox.client("ana"), sandbox.client("ben")
    for client in (ana, ben):
        client.add_remote(server, server.token("human:ana"))
    _, mine = new_plan(ana, "Tracked")
    theirs = ben.lattice_dir / "plans" / mine.name
    git(ana.dir, "init", "-q")
    git(ana.dir, "add", "-f", tracked)
    git(ana.dir, "commit", "-q", "-m", "tracked")
    wait_for(theirs.exists, "the plan in both caches")
    theirs.write_text(TEXT)
    wait_for(lambda: mine.read_text() == TEXT, "Ben's text to arrive")
    return server, ana, mine, theirs


def test_a_tracked_cache_sends_nothing_that_git_checks_out(sandbox: Sandbox) -> None:
    server, ana, mine, theirs = share_tracked_plan(sandbox, ".lattice/plans")
    for act in (("checkout", "--", "."), ("stash",), ("reset", "-q", "--hard"), ("checkout", "--", ".")):
        git(ana.dir, *act)
        wait_for(lambda: mine.read_text() == TEXT, f"the plan to be restored after git {act[0]}")
    assert theirs.read_text() == TEXT and not differences(server.lattice_dir(), ana.lattice_dir)
    assert "git wrote it" in ana.run("list").stderr
    pushed = ana.run("remote", "push")
    assert "tracks 1 file of .lattice" in pushed.stderr and "git help rm" in pushed.stderr


def test_files_from_git_with_their_own_base_are_restored(sandbox: Sandbox) -> None:
    server, ana, mine, theirs = share_tracked_plan(sandbox, ".lattice")
    for act in (("checkout", "--", "."), ("stash",), ("reset", "-q", "--hard")):
        git(ana.dir, *act)
        wait_for(lambda: mine.read_text() == TEXT, f"the plan to be restored after git {act[0]}")
        assert theirs.read_text() == TEXT
    ana.ok("remote", "agent", "stop")
    git(ana.dir, "checkout", "--", ".")
    assert ana.ok("plan", "LAT-1").count("A paragraph of his") == 6
    assert theirs.read_text() == TEXT and not differences(server.lattice_dir(), ana.lattice_dir)


def test_a_plan_rewritten_after_the_users_own_command_wins_as_it_does_locally(shared_board: Board) -> None:
    _server, ana, _ben = shared_board
    short_id, plan = new_plan(ana, "Rewritten")
    text = "# Plan\n\n- first\n- second\n\n## Notes\n\nnothing yet\n"
    plan.write_text(text)
    for column in ("in_planning", "planned"):
        ana.ok("status", short_id, column, *MINE)
    ana.ok("status", short_id, "in_planning", "--force", "--reason", "not yet", *MINE)
    assert plan.read_text().startswith(text) and plan.read_text() != text
    rewritten = text.replace("nothing yet", "much by now") + "- and a last line\n"
    plan.write_text(rewritten)
    pushed = ana.run("remote", "push")
    assert pushed.returncode == 0 and "conflict" not in pushed.stderr
    wait_for(
        lambda: not json.loads(ana.ok("remote", "status", "--json"))["data"]["unsent_edits"], "the edit to be sent"
    )
    assert plan.read_text() == rewritten and "rescued" not in ana.run("list").stderr
    assert ana.ok("remote", "resolve") == "No conflicts.\n"


@pytest.mark.parametrize("agent", [{}, {"LATTICE_REMOTE_AGENT": "off"}], ids=["agent", "no agent"])
def test_the_first_read_shows_the_servers_files(shared_board: Board, agent: dict[str, str]) -> None:
    """It holds for fifteen of fifteen, also while other files of the cache are unchanged."""
    _server, ana, _ben = shared_board
    short_id, plan = new_plan(ana, "As it is")
    task = ana.lattice_dir / "tasks" / f"{plan.stem}.json"
    whole = task.read_text()
    for _ in range(15):
        ana.ok("remote", "agent", "stop")
        task.write_text(whole.replace("As it is", "As it is not"))
        shown = ana.run("show", short_id, "--json", env=agent)
        assert json.loads(shown.stdout)["data"]["title"] == "As it is"
