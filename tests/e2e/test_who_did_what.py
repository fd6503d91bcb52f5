"""The audit log: actor, time and token of each change, the same at every client and at the server, running or not."""

import json
from typing import Any

import pytest

from sandbox import Client, Sandbox, Server

pytestmark = pytest.mark.e2e


def logged(client: Client, *argv: str) -> list[dict[str, Any]]:
    return list(json.loads(client.ok("remote", "log", *argv, "--json"))["data"]["entries"])


def logged_on(server: Server, *argv: str) -> list[dict[str, Any]]:
    return list(admin_log(server, *argv)["entries"])


def admin_log(server: Server, *argv: str) -> dict[str, Any]:
    return dict(json.loads(server.admin("log", "board", *argv, "--json")))


def test_the_log_names_actor_token_and_command_everywhere(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana, ben = sandbox.client("ana"), sandbox.client("ben")
    ana.add_remote(server, server.token("human:ana"))
    ben.add_remote(server, server.token("human:ben", "agent:*"))
    ana.ok("create", "One", "--actor", "human:ana")
    for shown in (json.loads(ana.ok("remote", "log", "-n", "1", "--json"))["data"], admin_log(server, "-n", "1")):
        assert len(shown["entries"]) == 1 and shown["more"] is False, "the only change is all there is"
    ben.ok("comment", "LAT-1", "\x1b[31mred\x07", "--actor", "agent:bot")
    ana.ok("archive", "LAT-1", "--actor", "human:ana")
    tokens = {token["actor"]: token["id"] for token in json.loads(server.admin("token", "list", "--json"))}

    found = logged(ben)
    assert [(entry["actor"], entry["token_actor"], entry["token_id"]) for entry in reversed(found)] == [
        ("human:ana", "human:ana", tokens["human:ana"]),
        ("agent:bot", "human:ben", tokens["human:ben"]),
        ("human:ana", "human:ana", tokens["human:ana"]),
    ]
    of_one = logged(ana, "--task", "LAT-1")
    assert of_one == found, "archived tasks have their log too"
    assert {entry["tasks"][0]["short_id"] for entry in of_one} == {"LAT-1"}
    assert logged_on(server, "-n", "2") == found[:2]
    assert json.loads(ben.ok("remote", "log", "-n", "2", "--json"))["data"]["more"] is True

    for shown in (ana.ok("remote", "log"), server.admin("log", "board")):
        assert "agent:bot (token of human:ben)" in shown and "archive LAT-1" in shown
        assert r"\x1b[31mred\x07" in shown and "\x1b" not in shown and "\x07" not in shown
    nobody = ana.run("remote", "log", "--task", "LAT-9")
    assert nobody.returncode == 1 and nobody.stderr == "Error: there is no task 'LAT-9' in this project\n"

    server.stop()
    assert logged_on(server) == found
    offline = ana.run("remote", "log", "--json")
    assert offline.returncode == 1 and json.loads(offline.stdout)["error"]["code"] == "REMOTE_UNREACHABLE"
