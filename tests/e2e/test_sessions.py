"""A session belongs to the token that started it, through changes of server, journal and token."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from preloaded_programs import warm
from sandbox import BIN, Client, Sandbox, Server

pytestmark = pytest.mark.e2e

START = ("session", "start", "--model", "m", "--framework", "f", "--quiet", "--name")


def start(client: Client, name: str) -> str:
    return client.ok(*START, name).strip()


def tokens(server: Server) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for token in json.loads(server.admin("token", "list", "--json")):
        found.setdefault(token["actor"], []).append(token["id"])
    return found


def comment(client: Client, session: str) -> subprocess.CompletedProcess[str]:
    return client.run("comment", "LAT-1", "x", "--name", session)


@pytest.fixture(scope="module")
def people() -> Iterator[tuple[Server, Client, Client, Client]]:
    """A server; Ana at her laptop and at her desktop, with a token each; Ben. Each may be any agent.

    Each test uses its own session names and leaves a running server.
    """
    with Sandbox(warm()) as sandbox:
        server = sandbox.started_server()
        clients = []
        for name in ("laptop", "desktop", "ben"):
            client = sandbox.client(name)
            client.add_remote(server, server.token("human:ben" if name == "ben" else "human:ana", "agent:*"))
            clients.append(client)
        clients[0].ok("create", "One", "--actor", "human:ana")
        yield (server, *clients)


def test_only_the_token_that_started_a_session_acts_as_it(people: tuple[Server, Client, Client, Client]) -> None:
    _, laptop, desktop, ben = people
    session = start(laptop, "Argus")
    assert comment(laptop, session).returncode == 0
    theirs = "Error: session Argus-1 belongs to another token, of human:ana: "
    refused = comment(ben, session)
    assert (refused.returncode, refused.stderr) == (1, theirs + "start your own with: lattice session start\n")
    advice = "start one with this token, and end the other with: lattice session end Argus-1\n"
    assert comment(desktop, session).stderr == theirs + advice
    looked = ben.run("next", "--name", session, "--json")
    assert json.loads(looked.stdout)["error"]["code"] == "REMOTE_FORBIDDEN", "even a look writes into the session"
    assert "Argus-1" in ben.ok("session", "list") and "Argus-1" in ben.ok("session", "show", session)
    unended = ben.run("session", "end", session)
    assert (unended.returncode, unended.stderr) == (1, theirs + "a token of human:ana can end it\n")
    assert start(ben, "Argus") == "Argus-2" and comment(ben, "Argus-2").returncode == 0
    desktop.ok("session", "end", session)
    assert "No active session named 'Argus-1'" in laptop.run("session", "end", session).stderr


def test_a_session_survives_restart_rotation_and_a_restored_backup_without_a_journal(
    people: tuple[Server, Client, Client, Client],
) -> None:
    server, laptop, _, ben = people
    session = start(laptop, "Copied")
    server.kill()
    copied = server.data.with_name("copied")
    shutil.copytree(server.data, copied, ignore=shutil.ignore_patterns("*.sock"))
    shutil.rmtree(copied / "projects/board/journal")
    server.data.rename(server.data.with_name("lost"))
    copied.rename(server.data)
    server.start()
    assert "belongs to another token" in comment(ben, session).stderr
    assert comment(laptop, session).returncode == 0
    text = server.admin("token", "rotate", tokens(server)["human:ana"][0])
    laptop.ok("remote", "login", stdin=text)
    assert comment(laptop, session).returncode == 0
    assert "belongs to another token" in comment(ben, session).stderr


def test_a_session_of_plain_lattice_belongs_to_every_token_that_may_act_as_its_actor(
    people: tuple[Server, Client, Client, Client],
) -> None:
    """I12."""
    server, laptop, _, ben = people
    own = {"LATTICE_ROOT": str(server.lattice_dir().parent), "LATTICE_REMOTE_SERVER": "1"}
    subprocess.run([BIN / "lattice", *START, "Local"], env={**server.env, **own}, check=True, capture_output=True)
    assert comment(laptop, "Local-1").returncode == 0 and comment(ben, "Local-1").returncode == 0


def test_a_session_without_a_known_owner_grants_no_actor(people: tuple[Server, Client, Client, Client]) -> None:
    server, laptop, _, _ = people
    session = start(laptop, "Mine")
    server.stop()
    owners = server.data / "projects/board/session_owners.json"
    assert owners.stat().st_mode & 0o777 == 0o600
    owners.write_text("{")
    server.start()
    assert "cannot read the owners of sessions (session_owners.json)" in comment(laptop, session).stderr
    assert "cannot read" in laptop.run(*START, "Other").stderr
    assert "Other" not in laptop.ok("session", "list"), "what could not be noted was undone"
    server.stop()
    owners.unlink()
    server.start()
    assert comment(laptop, session).returncode == 0


def test_a_session_of_a_deleted_token_is_ended_by_its_actors_other_token(
    people: tuple[Server, Client, Client, Client],
) -> None:
    server, laptop, desktop, ben = people
    session = start(laptop, "Gone")
    server.admin("token", "revoke", tokens(server)["human:ana"][0])
    assert ben.run("session", "end", session).returncode == 1
    assert desktop.run("session", "end", session).returncode == 0
