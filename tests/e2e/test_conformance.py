"""``lattice-remote conformance`` passes for our server, our client, and the client written from SPEC.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import standalone_client
from sandbox import BIN, Sandbox, Server

pytestmark = pytest.mark.e2e

ADAPTER = Path(__file__).parents[1] / "cache_client.py"


def conformance(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LATTICE_TOKEN": token}
    command = [BIN / "lattice-remote", "conformance", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=220, check=False)


def failed(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith("FAILED")]


@pytest.fixture
def server(sandbox: Sandbox) -> Server:
    server = sandbox.server()
    server.project("scratch")
    return server.start()


def test_our_server_conforms(server: Server) -> None:
    done = conformance(f"{server.url}/projects/scratch", token=server.token("human:ana", "agent:*", slug="scratch"))
    first, *lines, last = done.stdout.splitlines()
    assert "adds tasks" not in done.stderr and "add tasks" in first
    assert not failed(done) and done.returncode == 0, done.stdout
    assert last.startswith(f"{len(lines)} checks: {len(lines)} ok, 0 failed")


def test_a_project_in_use_is_written_to_only_on_request(server: Server) -> None:
    token, url = server.token("human:ana", slug="scratch"), f"{server.url}/projects/scratch"
    assert conformance(url, "--only", "Applied", token=token).returncode == 0
    again = conformance(url, "--only", "Applied", token=token)
    assert again.returncode == 2 and "--throw-away" in again.stderr and len(again.stderr.splitlines()) == 1
    allowed = conformance(url, "--only", "Applied", "--throw-away", "--json", token=token)
    report = json.loads(allowed.stdout)
    assert allowed.returncode == 0 and report["ok"] and [each["result"] for each in report["checks"]] == ["ok"]


def test_an_impossible_check_is_one_line_and_exit_2(server: Server) -> None:
    url = f"{server.url}/projects/scratch"
    for arguments in ((url,), (f"{server.url}/projects/other",), ("http://127.0.0.1:1/projects/x",)):
        done = conformance(*arguments, token="ltr_wrong")
        assert done.returncode == 2 and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert conformance().returncode == 2
    assert conformance(url, "--client", "x").returncode == 2


def test_our_client_conforms() -> None:
    done = conformance("--client", f"{sys.executable} {ADAPTER}")
    assert not failed(done) and done.returncode == 0, done.stdout + done.stderr


def test_client_in_one_file_conforms() -> None:
    done = conformance("--client", f"{sys.executable} {standalone_client.__file__}")
    assert not failed(done) and done.returncode == 0, done.stdout + done.stderr
