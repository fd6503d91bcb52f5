"""Rights of a token: read-only tokens, and edits while the client is connected."""

import contextlib
import http.client
import json
import socket
import threading

import pytest

from sandbox import Client, Sandbox, wait_for

pytestmark = pytest.mark.e2e


def test_a_read_only_token_reads_everything_and_writes_nothing(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana, guest = sandbox.client("ana"), sandbox.client("guest")
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "One", "--actor", "human:ana")
    token = json.loads(
        server.admin("token", "create", "--project", "board", "--actor", "human:guest", "--read-only", "--json")
    )["token"]
    guest.add_remote(server, token)
    assert "One" in guest.ok("list")
    before = (server.lattice_dir() / "ids.json").read_bytes()
    for argv in (
        ("create", "Two", "--actor", "human:guest"),
        ("comment", "LAT-1", "x", "--actor", "human:guest"),
        ("session", "start", "--name", "s", "--model", "m"),
        ("doctor", "--fix"),
    ):
        refused = guest.run(*argv)
        assert refused.returncode == 1, argv
        assert "this token may only read" in refused.stderr + refused.stdout, argv
    plan = next((guest.lattice_dir / "plans").glob("*.md"))
    plan.write_text(plan.read_text() + "by a guest\n")
    assert "this token may only read" in guest.run("remote", "push").stderr
    assert b"by a guest" not in next((server.lattice_dir() / "plans").glob("*.md")).read_bytes()
    assert "lattice remote resolve TASK --theirs" in guest.ok("remote", "status")
    assert "+by a guest" in guest.ok("remote", "resolve")
    assert "yours is kept; see: lattice remote rescued" in guest.ok("remote", "resolve", "LAT-1", "--theirs")
    wait_for(lambda: "by a guest" not in plan.read_text(), "the server's text")
    (kept,) = (guest.lattice_dir / ".remote" / "rescued").glob(f"*/files/plans/{plan.name}")
    assert kept.read_text().endswith("by a guest\n")
    guest.ok("remote", "rescued", "drop", "--all")
    guest.run("remote", "agent", "stop")
    plan.write_text(plan.read_text() + "without an agent\n")
    without_agent = {"LATTICE_REMOTE_AGENT": "off"}
    resolved = guest.run("remote", "resolve", "LAT-1", "--theirs", env=without_agent)
    assert "yours is kept" in resolved.stdout, resolved.stderr
    assert "without an agent" not in plan.read_text()

    def request(method: str, path: str, body: dict[str, str] | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        with contextlib.closing(connection):
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            content = json.loads(answer.read())
        assert answer.status == 200 or content["error"]["code"] == "REMOTE_FORBIDDEN"
        return answer.status

    assert request("GET", "/projects/board/tasks") == 200
    assert request("POST", "/projects/board/tasks", {"title": "Three", "actor": "human:guest"}) == 403
    assert request("PATCH", "/projects/board/tasks/LAT-1", {"title": "Four"}) == 403
    assert (server.lattice_dir() / "ids.json").read_bytes() == before
    ana.ok("comment", "LAT-1", "seen by the guest", "--actor", "human:ana")
    wait_for(lambda: "seen by the guest" in guest.run("comments", "LAT-1").stdout, "the change")


def test_an_edited_token_takes_effect_on_live_connections(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.project()
    server.project("other", "OTH")
    server.start()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    (token,) = json.loads(server.admin("token", "list", "--json"))
    ana.ok("create", "One", "--actor", "human:ana")
    server.admin("token", "edit", token["id"], "--act-as", "agent:*")
    wait_for(lambda: ana.run("comment", "LAT-1", "as an agent", "--actor", "agent:a").returncode == 0, "the new right")
    server.admin("token", "edit", token["id"], "--read-only")
    wait_for(lambda: ana.run("comment", "LAT-1", "no", "--actor", "agent:a").returncode == 1, "the lost right")
    server.admin("token", "edit", token["id"], "--read-write", "--add-project", "other", "--remove-project", "board")
    wait_for(
        lambda: (
            "not for this project" in ana.run("comment", "LAT-1", "no", "--actor", "agent:a").stderr
            or ana.run("comment", "LAT-1", "no", "--actor", "agent:a").returncode == 1
        ),
        "the lost project",
    )


def _checked_out(client: Client, url: str) -> None:
    client.lattice_dir.mkdir(parents=True)
    (client.lattice_dir / "remote.json").write_text(json.dumps({"url": url, "project": "board"}))


def test_a_token_for_a_server_works_without_a_login_and_for_no_other_server(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    create = ("token", "create", "--project", "board", "--actor", "human:ana", "--for")
    token = server.admin(*create, f"{server.url.upper()}/").split()[-1]
    with_token = {"LATTICE_TOKEN": token}
    ana = sandbox.client("ana")
    _checked_out(ana, server.url)
    made = ana.run("create", "One", "--actor", "human:ana", env=with_token)
    assert made.returncode == 0, made.stderr
    refused = ana.run("create", "Two", "--actor", "human:ana", env={"LATTICE_TOKEN": server.token("human:ana")})
    assert refused.returncode == 1 and f"lattice remote trust {server.url}" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "Two" not in ana.run("list", env=with_token).stdout

    received = b""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            nonlocal received
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        received += peer.recv(65536)

        threading.Thread(target=listen, daemon=True).start()
        eve = sandbox.client("eve")
        _checked_out(eve, f"http://127.0.0.1:{listener.getsockname()[1]}")
        for argv in (("list",), ("create", "x", "--actor", "human:ana"), ("remote", "pull"), ("remote", "projects")):
            refused = eve.run(*argv, env=with_token)
            assert refused.returncode == 1 and "no token was sent to http://127.0.0.1" in refused.stderr, argv
        listener.shutdown(socket.SHUT_RDWR)
    assert received == b""

    old = token
    token = server.admin("token", "rotate", token).split()[-1]
    assert token.rpartition(".")[2] == old.rpartition(".")[2] and token != old
    assert ana.run("comment", "LAT-1", "x", "--actor", "human:ana", env={"LATTICE_TOKEN": token}).returncode == 0
