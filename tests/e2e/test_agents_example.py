"""``examples/agents``: ten agents with a token each, in sandboxes, in containers and in CI (I13)."""

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from programs import program
from sandbox import BIN, Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "agents"
ANA = ("--actor", "human:ana")
WORK = """#!/bin/sh
# Fails if two agents have the resource at once.
set -e
mkdir "$PLACE/busy"
lattice comment "$1" "Worked on by $ACTOR" --quiet --actor "$ACTOR" >&2
echo "$ACTOR" >>"$PLACE/worked"
rmdir "$PLACE/busy"
"""


class Box:
    """A machine with one checkout for all agents. Its user has no token; each agent has its own."""

    def __init__(self, server: Server, ana: Client, sandbox: Sandbox) -> None:
        self.server, self.ana = server, ana
        self.client = sandbox.client("checkout", "box")
        self.client.lattice_dir.mkdir()
        shutil.copy(ana.lattice_dir / "remote.json", self.client.lattice_dir)
        self.place = sandbox.root / "place"
        self.place.mkdir()
        self.tokens = sandbox.root / "tokens"
        self.work = self.place / "work.sh"
        self.work.write_text(WORK)
        self.work.chmod(0o755)
        self.env = {**self.client.env, "LATTICE_REMOTE_URL": server.url, "PLACE": str(self.place)}

    def make_tokens(self, count: int) -> list[str]:
        subprocess.run(
            [EXAMPLES / "make_tokens.sh", "board", str(count), self.tokens],
            env=self.server.env,
            capture_output=True,
            check=True,
        )
        return [file.read_text().strip() for file in sorted(self.tokens.iterdir())]

    def fill(self, tasks: int) -> None:
        """Create tasks with a plan each, without which lattice refuses a start."""
        self.ana.ok("resource", "create", "gpu", *ANA)
        for number in range(tasks):
            made = json.loads(self.ana.ok("create", f"Task {number}", *ANA, "--json"))["data"]
            plan = self.ana.lattice_dir / "plans" / f"{made['id']}.md"
            plan.write_text(plan.read_text() + "\n1. Do it.\n")
        self.ana.ok("remote", "push")

    def run(self, *argv: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the checkout."""
        return subprocess.run(
            [str(part) for part in argv],
            cwd=self.client.dir,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def statuses(self) -> list[str]:
        return [task["status"] for task in json.loads(self.ana.ok("list", "--json"))["data"]]


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Box]:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    yield Box(server, ana, sandbox)


def test_tokens_are_created_once_and_readable_only_by_their_owner(box: Box) -> None:
    first = box.make_tokens(2)
    assert box.make_tokens(3)[:2] == first
    assert [stat.S_IMODE(file.stat().st_mode) for file in box.tokens.iterdir()] == [0o600] * 3
    assert {token["actor"] for token in json.loads(box.server.admin("token", "list", "--json"))} >= {
        "agent:1",
        "agent:2",
        "agent:3",
    }


def test_ten_agents_do_each_task_once_one_at_a_time_under_their_own_names(box: Box) -> None:
    box.make_tokens(10)
    box.fill(10)
    done = box.run(EXAMPLES / "start_agents.sh", box.tokens, EXAMPLES / "agent.sh", box.work)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 10
    assert box.statuses() == ["done"] * 10
    assert len((box.place / "worked").read_text().split()) == 10
    entries = json.loads(box.ana.ok("remote", "log", "-n", "200", "--json"))["data"]["entries"]
    by_agents = [entry for entry in entries if entry["actor"].startswith("agent:")]
    assert len(by_agents) >= 10 * 5
    assert all(entry["actor"] == entry["token_actor"] for entry in by_agents)
    assert not differences(box.client.lattice_dir, box.server.lattice_dir())


def test_an_agent_whose_work_fails_releases_the_resource_and_resumes_its_task(box: Box) -> None:
    [token] = box.make_tokens(1)
    box.fill(1)
    failed = box.run(EXAMPLES / "agent.sh", "false", ACTOR="agent:1", LATTICE_TOKEN=token)
    assert failed.returncode == 1
    assert "available" in box.ana.ok("resource", "status", "gpu")
    assert box.statuses() == ["in_progress"]
    resumed = box.run(EXAMPLES / "agent.sh", box.work, ACTOR="agent:1", LATTICE_TOKEN=token)
    assert resumed.returncode == 0, resumed.stderr
    assert box.statuses() == ["done"]


def test_stopped_agents_release_the_resource(box: Box) -> None:
    box.make_tokens(2)
    box.fill(2)
    work = box.place / "long.sh"
    work.write_text('#!/bin/sh\ntouch "$PLACE/started"\nexec sleep 600\n')
    work.chmod(0o755)
    agents = subprocess.Popen(
        [EXAMPLES / "start_agents.sh", box.tokens, EXAMPLES / "agent.sh", work],
        cwd=box.client.dir,
        env=box.env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for((box.place / "started").exists, "an agent to work", 60)
    os.killpg(agents.pid, signal.SIGTERM)  # Ctrl-C reaches all processes of a terminal
    assert agents.wait(60) == 130
    wait_for(lambda: "available" in box.ana.ok("resource", "status", "gpu"), "the resource to be free", 60)


# --- sandboxes ---


@pytest.fixture(params=["bwrap", "unshare"])
def sandbox_path(request: pytest.FixtureRequest, box: Box) -> str:
    """Return a PATH with or without bubblewrap."""
    if request.param == "bwrap":
        program("bwrap")
        return box.env["PATH"]
    tools = box.place / "tools"
    tools.mkdir()
    for name in ("sh", "unshare", "mount", "touch", "cat", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    return f"{BIN}:{tools}"


def test_a_sandbox_without_network_reads_its_work_and_writes_through_mcp(box: Box, sandbox_path: str) -> None:
    [token] = box.make_tokens(1)
    box.ana.ok("create", "First", *ANA)
    env = {"LATTICE_TOKEN": token}
    assert box.run("lattice", "list", "--quiet", **env).stdout == "LAT-1\n"
    sealed = {**env, "PATH": sandbox_path}
    read = box.run(EXAMPLES / "sandbox.sh", "lattice", "list", "--quiet", **sealed)
    assert (read.returncode, read.stdout) == (0, "LAT-1\n"), read
    assert read.stderr.count("\n") == 1 and "cannot reach server" in read.stderr
    refused = box.run(EXAMPLES / "sandbox.sh", "lattice", "comment", "LAT-1", "x", "--actor", "agent:1", **sealed)
    assert refused.returncode == 1 and "cannot reach" in refused.stderr
    home = box.run(EXAMPLES / "sandbox.sh", "touch", f"{box.env['HOME']}/file", **sealed)
    assert home.returncode == 1 and not Path(box.env["HOME"], "file").exists()

    async def write() -> None:
        command = json.loads((EXAMPLES / "mcp.json").read_text())["mcpServers"]["lattice"]
        variables = {name: value.replace("${LATTICE_TOKEN}", token) for name, value in command["env"].items()}
        server = StdioServerParameters(
            command=command["command"], args=command["args"], env={**box.env, **variables}, cwd=box.client.dir
        )
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            called = {"task_id": "LAT-1", "text": "by MCP", "actor": "agent:1"}
            assert not (await session.call_tool("lattice_comment", called)).isError

    asyncio.run(write())
    after = box.run(EXAMPLES / "sandbox.sh", "lattice", "comments", "LAT-1", **sealed)
    assert "by MCP" in after.stdout


def test_an_agent_works_in_a_sandbox_with_network(box: Box, sandbox_path: str) -> None:
    [token] = box.make_tokens(1)
    box.ana.ok("create", "First", *ANA)
    wall = (EXAMPLES / "sandbox.sh", "--network")
    done = box.run(
        *wall, "lattice", "comment", "LAT-1", "x", "--actor", "agent:1", LATTICE_TOKEN=token, PATH=sandbox_path
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "x" in box.ana.ok("comments", "LAT-1")


# --- containers ---


def test_agents_in_containers_share_one_checkout(box: Box) -> None:
    """Runs the service of compose.yaml in namespaces, without an engine."""
    service = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"]["agent"]
    assert (EXAMPLES / service["build"]["context"] / service["build"]["dockerfile"]).resolve().exists()
    assert service["entrypoint"] == ["sh", "/opt/agent.sh"] and service["volumes"][1].startswith("./agent.sh:")
    assert (service["working_dir"], service["tmpfs"], service["read_only"]) == ("/mnt", ["/tmp"], True)
    tokens = box.make_tokens(3)
    box.fill(6)
    script = """
        mount --bind "$CHECKOUT" /mnt
        mount --bind / / ; mount -o remount,ro,bind /
        mount -t tmpfs none /tmp
        cd /mnt
        exec sh -c "$AGENT" agent sh -c 'lattice comment "$1" done --quiet --actor "$ACTOR" >&2' work"""
    wall = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0:
        wall.insert(1, "--map-root-user")
    kept = {name: box.env[name] for name in ("PATH", "LATTICE_REMOTE_URL")}
    containers = []
    for number, token in enumerate(tokens, 1):
        env = {name: value for name, value in service["environment"].items() if not value.startswith("${")}
        env |= {**kept, "ACTOR": f"agent:{number}", "LATTICE_TOKEN": token}
        assert env.keys() == service["environment"].keys() | {"PATH"}
        env |= {"CHECKOUT": str(box.client.dir), "AGENT": (EXAMPLES / "agent.sh").read_text()}
        containers.append(
            subprocess.Popen(
                [*wall, "sh", "-ec", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for container in containers:
        _, stderr = container.communicate(timeout=200)
        assert container.returncode == 0, stderr
    assert box.statuses() == ["done"] * 6
    assert not differences(box.client.lattice_dir, box.server.lattice_dir())


# --- CI ---


def test_a_ci_job_reports_its_result_on_the_branchs_task(box: Box, sandbox: Sandbox) -> None:
    [token] = box.make_tokens(1)
    box.ana.ok("create", "First", *ANA)
    env = {"LATTICE_TOKEN": token, "ACTOR": "agent:1"}
    for branch, command, code in (
        ("LAT-1-parser", ("true",), 0),
        ("feature/LAT-1", ("sh", "-c", "exit 3"), 3),
        ("main", ("true",), 0),
        ("LAT-99", ("true",), 0),
    ):
        assert box.run(EXAMPLES / "ci.sh", branch, *command, **env).returncode == code
    comments = [comment["body"] for comment in json.loads(box.ana.ok("comments", "LAT-1", "--json"))["data"]]
    assert sorted(comments) == ["CI: sh -c exit 3 failed with 3", "CI: true passed"]
    box.server.stop()
    offline = box.run(EXAMPLES / "ci.sh", "LAT-1", "true", **env)
    assert offline.returncode == 0 and "The board was not updated." in offline.stderr
