"""``lattice remote doctor``: real processes find each fault and report a remedy and an exit code."""

import base64
import contextlib
import datetime
import email.utils
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from sandbox import Client, Sandbox, Server

pytestmark = pytest.mark.e2e

Place = tuple[Server, Client]


@pytest.fixture
def place(sandbox: Sandbox) -> Place:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    return server, ana


def examine(client: Client, **env: str) -> dict[str, dict[str, Any]]:
    """Return the checks by name, after comparing them with the exit code and the text."""
    done = client.run("remote", "doctor", "--json", env=env)
    assert not done.stderr, done.stderr
    data = json.loads(done.stdout)["data"]
    problems = [check for check in data["checks"] if not check["ok"]]
    assert data["problems"] == len(problems) and done.returncode == (1 if problems else 0)
    assert all(check["do"] and "\n" not in check["found"] + check["do"] for check in problems), problems
    assert not any(check["do"] for check in data["checks"] if check["ok"])
    return {check["name"]: check for check in data["checks"]}


def problems_of(client: Client, **env: str) -> dict[str, str]:
    """Return finding and remedy of each problem."""
    return {name: f"{each['found']}; {each['do']}" for name, each in examine(client, **env).items() if not each["ok"]}


def test_a_healthy_machine_has_no_problem_and_is_not_changed(place: Place) -> None:
    _, ana = place
    ana.ok("remote", "agent", "stop")
    ana.run("remote", "doctor")
    before = sorted(path for path in ana.dir.parent.rglob("*") if path.is_file())
    checks = examine(ana)
    assert sorted(path for path in ana.dir.parent.rglob("*") if path.is_file()) == before
    assert {"configuration", "token", "server", "clock", "agent", "sockets", "git", "lattice"} <= checks.keys()
    assert all(check["ok"] for check in checks.values()), checks
    text = ana.ok("remote", "doctor")
    assert text.endswith("No problems found.\n") and text.count("\nok ") + 1 == len(checks)
    assert "ltr_" not in text + json.dumps(checks)


def test_faults_of_configuration_and_token(place: Place, sandbox: Sandbox) -> None:
    server, ana = place
    assert "lattice remote clone" in problems_of(ana.elsewhere(sandbox.root))["configuration"]
    config = Path(ana.env["HOME"]) / ".config" / "lattice"
    (config / "tokens.json").chmod(0o644)
    assert "chmod 600" in problems_of(ana)["token"]
    (config / "tokens.json").chmod(0o600)
    servers = (config / "servers.json").read_text()
    (config / "servers.json").write_text("{")
    assert "servers.json is not valid" in problems_of(ana)["configuration"]
    (config / "servers.json").write_text(servers)
    remote = (ana.lattice_dir / "remote.json").read_text()
    (ana.lattice_dir / "remote.json").write_text("<<<<<<<")
    assert f"lattice remote add origin {server.url} --project board" in problems_of(ana)["configuration"]
    (ana.lattice_dir / "remote.json").unlink()
    assert "its remote.json is gone" in problems_of(ana)["configuration"]
    (ana.lattice_dir / "remote.json").write_text(remote)
    assert problems_of(ana) == {}
    assert "unknown token; replace or unset LATTICE_TOKEN" in problems_of(ana, LATTICE_TOKEN="ltr_x")["server"]
    server.admin("token", "revoke", json.loads((config / "tokens.json").read_text())["tokens"][server.url]["board"])
    assert f"lattice remote login {server.url}/board" in problems_of(ana)["server"]
    ana.ok("remote", "logout")
    assert f"lattice remote login {server.url}/board" in problems_of(ana)["token"]
    assert "no token was sent" in problems_of(ana, LATTICE_TOKEN=server.token("human:ana"))["server"]


def test_a_stopped_server(place: Place) -> None:
    server, ana = place
    server.stop()
    assert f"cannot reach {server.url}: connection refused" in problems_of(ana)["server"]


def test_a_certificate_that_expires_soon_or_is_unknown(sandbox: Sandbox, tmp_path: Path) -> None:
    authority, now = trustme.CA(), datetime.datetime.now(datetime.UTC)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued = authority.issue_cert("localhost", not_after=now + datetime.timedelta(days=3, hours=1))
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o600)
    server = sandbox.server()
    server.project()
    token = server.token("human:ana")
    server.start("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    ana, url = sandbox.client("ana"), f"https://localhost:{server.port}"
    ana.ok("remote", "add", "origin", f"{url}/board", "--ca-file", str(tmp_path / "ca.pem"), "--token", token)
    assert "expires in 3 days; its administrator must renew it" in problems_of(ana)["TLS"]
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    assert f"lattice remote trust {url} --ca-file FILE" in problems_of(ana)["TLS"]


@contextlib.contextmanager
def _late_server(behind_s: float) -> Iterator[int]:
    """Accept upgrades as a server with a slow clock; yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        request = peer.recv(65536).decode()
                        key = request.partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
                        accept = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()  # noqa: S324
                        date = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=behind_s)
                        lines = (
                            "HTTP/1.1 101 Switching Protocols",
                            "Upgrade: websocket",
                            "Connection: Upgrade",
                            "Sec-WebSocket-Protocol: lattice.v1",
                            f"Sec-WebSocket-Accept: {base64.b64encode(accept).decode()}",
                            f"Date: {email.utils.format_datetime(date, usegmt=True)}",
                        )
                        peer.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
                        peer.recv(65536)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def test_a_clock_that_differs_from_the_servers(sandbox: Sandbox) -> None:
    ana = sandbox.client("ana")
    ana.lattice_dir.mkdir()
    with _late_server(3600) as port:
        url = f"http://127.0.0.1:{port}"
        (ana.lattice_dir / "remote.json").write_text(json.dumps({"url": url, "project": "board"}))
        ana.ok("remote", "trust", url)
        found = problems_of(ana, LATTICE_TOKEN="ltr_any")
    assert found.keys() == {"clock"}
    assert " s ahead of the server's" in found["clock"] and "timedatectl" in found["clock"]


def test_a_hanging_agent_and_a_directory_writable_by_others(place: Place) -> None:
    _, ana = place
    ana.ok("list")
    agent = json.loads(ana.ok("remote", "agent", "status", "--json"))["data"]
    os.kill(agent["pid"], signal.SIGSTOP)
    try:
        assert f"process {agent['pid']}, does not answer" in problems_of(ana)["agent"]
    finally:
        os.kill(agent["pid"], signal.SIGCONT)
    directory = Path(agent["socket"]).parent
    directory.chmod(0o777)
    assert "is writable by others" in problems_of(ana)["sockets"]
    directory.chmod(0o700)
    assert "switched off" in examine(ana, LATTICE_REMOTE_AGENT="off")["agent"]["found"]
    assert "sockets" in problems_of(ana, LATTICE_REMOTE_RUNTIME_DIR=str(ana.lattice_dir / "remote.json" / "x"))


def test_a_repository_that_tracks_the_cache(place: Place) -> None:
    _, ana = place
    subprocess.run(["git", "init", "-q"], cwd=ana.dir, check=True)
    subprocess.run(["git", "add", ".lattice/remote.json"], cwd=ana.dir, check=True)
    assert problems_of(ana) == {}
    subprocess.run(["git", "add", "-f", ".lattice/config.json"], cwd=ana.dir, check=True)
    assert "tracks 1 file of .lattice, such as config.json" in problems_of(ana)["git"]


def test_a_lattice_of_another_installation_on_the_path(place: Place, tmp_path: Path) -> None:
    _, ana = place
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    tracker, ours = packages / "lattice_tracker-0.2.0.dist-info", packages / "lattice_remote-0.1.0.dist-info"
    for directory in (tmp_path / "bin", tracker, ours):
        directory.mkdir(parents=True)
    (tracker / "entry_points.txt").write_text("[console_scripts]\nlattice = lattice.cli.main:cli\n")
    for name in ("lattice", "lattice-mcp"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\ntouch ran\n")
        (tmp_path / "bin" / name).chmod(0o755)
    first = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{ana.env['PATH']}"}
    found = problems_of(ana, **first)
    assert found.keys() == {"lattice", "lattice-mcp"} and "lattice remote mcp" in found["lattice-mcp"]
    assert f"{tmp_path / 'bin' / 'lattice'} is of another installation, without lattice-remote" in found["lattice"]
    entry = "[lattice.cli_plugins]\nremote = lattice_remote.client.plugin:register\n"
    (ours / "entry_points.txt").write_text(entry)
    assert problems_of(ana, **first) == {}
    assert not (ana.dir / "ran").exists()
    assert "there is no lattice on the PATH" in problems_of(ana, PATH="/nonexistent")["lattice"]
