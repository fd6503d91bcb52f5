"""``lattice remote mcp`` against lattice's own MCP server, with the real MCP client: tools, results, errors, files."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import CallToolResult
from normaliser import Normaliser

from lattice_remote.client.mcp import _READS
from lattice_remote.server.worker.calls.mcp import _TOOLS
from sandbox import BIN, Client, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e

ANA = {"actor": "human:ana"}
BOT = {"actor": "agent:bot"}
ONE = {"task_id": "LAT-1"}

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("lattice_list", {}),
    ("lattice_create", {"title": "One", **ANA}),
    ("lattice_create", {"title": "Zwei: größer", "tags": "a, b", "assigned_to": "agent:bot", **BOT}),
    ("lattice_create", {"title": "Three", "task_id": "task_01ARZ3NDEKTSV4RRFFQ69G5FAV", "description": "d", **ANA}),
    ("lattice_create", {"title": "Three", "task_id": "task_01ARZ3NDEKTSV4RRFFQ69G5FAV", "description": "d", **ANA}),
    ("lattice_create", {"title": "Other", "task_id": "task_01ARZ3NDEKTSV4RRFFQ69G5FAV", **ANA}),
    ("lattice_create", {"title": "x", "status": "nowhere", **ANA}),
    ("lattice_create", {"title": "x"}),
    ("lattice_create", {"title": ["x"], **ANA}),
    ("lattice_create", {"title": "x", "colour": "blue", **ANA}),
    ("lattice_update", {"fields": {"title": "New", "tags": ["c"], "custom_fields.x": {"deep": [1]}}, **ONE, **ANA}),
    ("lattice_update", {"fields": '{"priority": "high"}', **ONE, **ANA}),
    ("lattice_update", {"fields": {}, **ONE, **ANA}),
    ("lattice_update", {"fields": {"status": "done"}, **ONE, **ANA}),
    ("lattice_status", {"new_status": "in_planning", **ONE, **ANA}),
    ("lattice_status", {"new_status": "in_planning", **ONE, **ANA}),
    ("lattice_status", {"new_status": "done", **ONE, **ANA}),
    ("lattice_status", {"new_status": "done", "force": "true", "reason": "because", **ONE, **ANA}),
    ("lattice_assign", {"assignee": "agent:bot", **ONE, **ANA}),
    ("lattice_assign", {"assignee": "nobody", **ONE, **ANA}),
    ("lattice_comment", {"text": "First.\nIt is longer.", **ONE, **ANA}),
    ("lattice_comment", {"text": "A reply", "parent_id": "{comment}", **ONE, **BOT}),
    ("lattice_comment", {"text": " ", **ONE, **ANA}),
    ("lattice_comment_edit", {"comment_id": "{comment}", "new_text": "Changed", **ONE, **ANA}),
    ("lattice_comment_edit", {"comment_id": "ev_none", "new_text": "Changed", **ONE, **ANA}),
    ("lattice_react", {"comment_id": "{comment}", "emoji": "thumbsup", **ONE, **ANA}),
    ("lattice_react", {"comment_id": "{comment}", "emoji": "thumbsup", **ONE, **ANA}),
    ("lattice_react", {"comment_id": "{comment}", "emoji": "no emoji!", **ONE, **ANA}),
    ("lattice_unreact", {"comment_id": "{comment}", "emoji": "thumbsup", **ONE, **ANA}),
    ("lattice_unreact", {"comment_id": "{comment}", "emoji": "thumbsup", **ONE, **ANA}),
    ("lattice_comment_delete", {"comment_id": "{comment}", **ONE, **ANA}),
    ("lattice_comment_delete", {"comment_id": "{comment}", **ONE, **ANA}),
    ("lattice_link", {"source_id": "LAT-1", "relationship_type": "blocks", "target_id": "LAT-2", "note": "n", **ANA}),
    ("lattice_link", {"source_id": "LAT-1", "relationship_type": "blocks", "target_id": "LAT-2", **ANA}),
    ("lattice_unlink", {"source_id": "LAT-1", "relationship_type": "blocks", "target_id": "LAT-2", **ANA}),
    ("lattice_unlink", {"source_id": "LAT-1", "relationship_type": "likes", "target_id": "LAT-2", **ANA}),
    ("lattice_attach", {"source": "data.bin", "title": "Data", **ONE, **ANA}),
    ("lattice_attach", {"source": "{dir}/größer.txt", "summary": "s", **ONE, **ANA}),
    ("lattice_attach", {"source": "large.bin", **ONE, **ANA}),
    ("lattice_attach", {"source": "https://example.org/x", **ONE, **ANA}),
    ("lattice_attach", {"source": "none.txt", **ONE, **ANA}),
    ("lattice_attach", {"source": ".", **ONE, **ANA}),
    ("lattice_attach", {"source": "data.bin", "art_type": "painting", **ONE, **ANA}),
    ("lattice_branch_link", {"branch": "feature/x", **ONE, **ANA}),
    ("lattice_branch_link", {"branch": "-x", **ONE, **ANA}),
    ("lattice_branch_unlink", {"branch": "feature/x", **ONE, **ANA}),
    ("lattice_branch_unlink", {"branch": "feature/x", **ONE, **ANA}),
    ("lattice_event", {"event_type": "x_deployed", "data": {"to": ["prod"]}, **ONE, **ANA}),
    ("lattice_event", {"event_type": "status_changed", **ONE, **ANA}),
    ("lattice_archive", {"task_id": "LAT-2", **ANA}),
    ("lattice_archive", {"task_id": "LAT-2", **ANA}),
    ("lattice_unarchive", {"task_id": "LAT-2", **ANA}),
    ("lattice_unarchive", {"task_id": "LAT-99", **ANA}),
    ("lattice_archive", {"task_id": "LAT-3", "lattice_root": "{dir}", **ANA}),
    ("lattice_comments", ONE),
    ("lattice_comments", {"task_id": "LAT-99"}),
    ("lattice_list", {"status": "done"}),
    ("lattice_show", ONE),
    ("lattice_show", {"task_id": "LAT-3", "lattice_root": "{dir}"}),
    ("lattice_show", {"task_id": "no id"}),
    ("lattice_show", {"task_id": "LAT-1", "lattice_root": "{dir}/none"}),
    ("lattice_config", {}),
    ("lattice_config", {"lattice_root": "{dir}/none"}),
    ("lattice_doctor", {}),
    ("lattice_doctor", {"fix": True}),
    ("lattice_doctor", {"lattice_root": "{dir}/none"}),
    ("lattice_none", {}),
]
"""Calls in sequence; ``{comment}`` is the first comment's id, ``{dir}`` the server's working directory."""

RESOURCES = [
    *("lattice://tasks", "lattice://tasks/LAT-1", "lattice://tasks/status/done", "lattice://tasks/assigned/agent:bot"),
    *("lattice://config", "lattice://plans/LAT-1", "lattice://notes/LAT-1", "lattice://tasks/LAT-99", "lattice://none"),
]


@contextlib.asynccontextmanager
async def session(client: Client, *command: str, env: dict[str, str] | None = None) -> AsyncIterator[ClientSession]:
    """Start an MCP server in a client's directory, as an MCP client does; its stderr goes to ``mcp.log``."""
    program, *arguments = command or ("lattice", "remote", "mcp")
    parameters = StdioServerParameters(
        command=str(BIN / program), args=arguments, cwd=client.dir, env={**client.env, **(env or {})}
    )
    with (client.dir / "mcp.log").open("a") as log:
        async with stdio_client(parameters, errlog=log) as streams, ClientSession(*streams) as made:
            await made.initialize()
            yield made


def told(result: CallToolResult) -> Any:
    """Return the result of a successful tool."""
    assert not result.isError, result
    pieces = [getattr(piece, "text", "") for piece in result.content]
    return json.loads(pieces[0]) if result.structuredContent is None else result.structuredContent["result"]


class Result(NamedTuple):
    """The normalised result of one call."""

    is_error: bool
    said: str
    structured: str


class Side:
    """One MCP server, and the ids of its project so far."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.normalise = Normaliser({str(client.dir): "DIR", client.env["HOME"]: "HOME"})
        self.declared: list[Any] = []
        self.results: list[Result] = []
        self.read: list[str] = []
        self._comment = ""

    async def run(self, *command: str) -> None:
        async with session(self.client, *command) as asked:
            self.declared = [
                (await asked.list_tools()).model_dump(),
                (await asked.list_resources()).model_dump(),
                (await asked.list_resource_templates()).model_dump(),
            ]
            for name, arguments in CALLS:
                self.results.append(await self._call(asked, name, arguments))
            for uri in RESOURCES:
                self.read.append(await self._read(asked, uri))

    async def _call(self, asked: ClientSession, name: str, arguments: dict[str, Any]) -> Result:
        filled = json.dumps(arguments).replace("{comment}", self._comment).replace("{dir}", str(self.client.dir))
        result = await asked.call_tool(name, json.loads(filled))
        if name == "lattice_comment" and not self._comment:
            self._comment = told(result)["last_event_id"]
        said = "\n".join(getattr(piece, "text", "") for piece in result.content)
        return Result(result.isError, self.normalise(said), self.normalise(json.dumps(result.structuredContent)))

    async def _read(self, asked: ClientSession, uri: str) -> str:
        try:
            contents = (await asked.read_resource(uri)).contents  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - what it is, is compared
            return self.normalise(f"{type(error).__name__}: {error}")
        return self.normalise("".join(f"{content.mimeType} {getattr(content, 'text', '')}" for content in contents))


class Both(NamedTuple):
    server: Server
    here: Side
    there: Side


def prepare_inputs(directory: Path) -> None:
    (directory / "data.bin").write_bytes(bytes(range(256)))
    (directory / "größer.txt").write_text("text\n")
    (directory / "large.bin").write_bytes(b"0123456789abcdef" * 40_000)


@pytest.fixture(scope="module")
def both(shared_board: tuple[Server, Client, Client], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    server, ana, ben = shared_board
    local = ben.elsewhere(tmp_path_factory.mktemp("local") / ana.dir.name)
    shutil.copytree(server.lattice_dir(), local.lattice_dir)
    for directory in (local.dir, ana.dir):
        prepare_inputs(directory)
    here, there = Side(local), Side(ana)

    async def run() -> None:
        await asyncio.gather(here.run("lattice-mcp"), there.run())

    asyncio.run(run())
    yield Both(server, here, there)


def test_tools_schemas_and_resources_are_lattices_own(both: Both) -> None:
    assert both.there.declared == both.here.declared
    assert len(both.there.declared[0]["tools"]) > 20


def test_every_tool_is_called(both: Both) -> None:
    """The MCP server lists the expected tools; a tool without a call here fails this test."""
    every = {tool["name"] for tool in both.there.declared[0]["tools"]}
    succeeded = {name for (name, _), result in zip(CALLS, both.there.results, strict=True) if not result.is_error}
    failed = {name for (name, _), result in zip(CALLS, both.there.results, strict=True) if result.is_error}
    assert succeeded == every
    assert every <= failed | {"lattice_list"}
    assert every == _READS | _TOOLS.keys()
    for tool in both.there.declared[0]["tools"]:
        if tool["name"] in _TOOLS:
            assert set(tool["inputSchema"]["properties"]) == {*_TOOLS[tool["name"]], "lattice_root"}


def test_every_result_equals_a_local_projects(both: Both) -> None:
    pairs = zip(CALLS, both.here.results, both.there.results, strict=True)
    different = [(call, here, there) for call, here, there in pairs if here != there]
    assert not different, "\n\n".join(f"{call}\n local: {here}\nremote: {there}" for call, here, there in different)


def test_every_resource_equals_a_local_projects(both: Both) -> None:
    assert dict(zip(RESOURCES, both.there.read, strict=True)) == dict(zip(RESOURCES, both.here.read, strict=True))


def test_every_call_leaves_the_files_of_a_local_project(both: Both) -> None:
    local, remote = (side.normalise.files(tree_of(side.client.lattice_dir)) for side in (both.here, both.there))
    assert sorted(local) == sorted(remote)
    assert {path for path in local if local[path] != remote[path]} == set()


def test_the_cache_equals_the_server_and_the_log_names_the_tools(both: Both) -> None:
    """I3."""
    ana = both.there.client
    wait_for(lambda: differences(ana.lattice_dir, both.server.lattice_dir()) == [], "large files to come")
    log = json.loads(ana.ok("remote", "log", "--json", "-n", "100"))["data"]["entries"]
    assert {entry["command"] for entry in log} == {f"mcp: {name}" for name in _TOOLS.keys() - {"lattice_doctor"}}
    assert {entry["actor"] for entry in log} == {"human:ana", "agent:bot"}


async def test_concurrent_calls_all_run_under_their_own_actors(both: Both) -> None:
    texts = {f"at once {number}" for number in range(12)}
    async with session(both.there.client) as asked:
        arguments = [{"task_id": "LAT-1", "text": text, "actor": "agent:bot"} for text in texts]
        results = await asyncio.gather(*(asked.call_tool("lattice_comment", each) for each in arguments))
        assert not any(result.isError for result in results)
        comments = await asked.call_tool("lattice_comments", {"task_id": "LAT-1"})
        foreign = await asked.call_tool("lattice_create", {"title": "x", "actor": "human:ben"})
    assert foreign.isError
    assert foreign.content[0].text == (  # type: ignore[union-attr]
        "Error executing tool lattice_create: token may act as human:ana, agent:*; not as human:ben"
    )
    assert texts <= {comment["body"] for comment in told(comments)}


async def test_each_call_uses_the_project_that_it_names(
    shared_board: tuple[Server, Client, Client], both: Both, tmp_path: Path
) -> None:
    """The projects are this one, a plain local one, and a cache of another server's project."""
    server, ana, ben = shared_board
    plain = ben.elsewhere(tmp_path / "plain")
    plain.ok("init", "--project-code", "PLN", "--actor", "human:ben", "--no-setup-claude", "--no-setup-agents")
    server.admin("project", "create", "other", "--code", "OTH")
    other = ana.elsewhere(tmp_path / "other")
    other.add_remote(server, server.token("human:cleo", slug="other"), "other")
    async with session(ana) as asked:

        async def create(root: Path | None, actor: str) -> dict[str, Any]:
            named = {} if root is None else {"lattice_root": str(root)}
            made = told(await asked.call_tool("lattice_create", {"title": "where?", "actor": actor, **named}))
            assert isinstance(made, dict)
            return made

        assert (await create(None, "human:ana"))["short_id"].startswith("LAT-")
        assert (await create(ana.dir, "human:ana"))["short_id"].startswith("LAT-")
        assert (await create(plain.dir, "human:whoever"))["short_id"] == "PLN-1"
        assert (await create(other.dir, "human:cleo"))["short_id"] == "OTH-1"
    assert differences(other.lattice_dir, server.lattice_dir("other")) == []
    assert len(list((plain.lattice_dir / "tasks").iterdir())) == 1


async def test_an_mcp_server_survives_its_server_and_its_agent(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    create = {"title": "x", "actor": "human:ana"}
    async with session(ana) as asked:
        assert not (await asked.call_tool("lattice_create", create)).isError
        await asyncio.to_thread(server.stop)
        lost = await asked.call_tool("lattice_create", create)
        assert lost.isError and "cannot reach server" in lost.content[0].text  # type: ignore[union-attr]
        offline = await asked.call_tool("lattice_list", {})
        assert len(told(offline)) == 1, "reads go on"
        notice = str(getattr(offline.content[-1], "text", ""))
        assert re.fullmatch(r"Not current: cannot reach server .*; showing data from \d+ s ago \(change 1\)", notice)
        assert offline.structuredContent == {
            "result": told(offline),
            "not_current": notice.removeprefix("Not current: "),
        }
        shown = await asked.call_tool("lattice_show", ONE)
        assert told(shown)["title"] == "x" and "Not current:" in str(shown.content[-1])
        read = (await asked.read_resource("lattice://tasks/LAT-1")).contents  # type: ignore[arg-type]
        assert [json.loads(read[0].text)["title"], read[1].text[:12]] == ["x", "Not current:"]  # type: ignore[union-attr]
        await asyncio.to_thread(server.start)
        agent = json.loads(await asyncio.to_thread(ana.ok, "remote", "agent", "status", "--json"))["data"]["pid"]
        os.kill(agent, signal.SIGKILL)
        assert not (await asked.call_tool("lattice_create", create)).isError
        assert "Not current" not in str(await asked.call_tool("lattice_list", {}))
    assert differences(ana.lattice_dir, server.lattice_dir()) == []
    assert "showing data from" in (ana.dir / "mcp.log").read_text()


async def test_an_mcp_server_works_without_an_agent(both: Both) -> None:
    async with session(both.there.client, env={"LATTICE_REMOTE_AGENT": "off"}) as asked:
        made = told(await asked.call_tool("lattice_create", {"title": "without", "actor": "human:ana"}))
        shown = told(await asked.call_tool("lattice_show", {"task_id": made["short_id"]}))
        assert shown["title"] == "without"


def test_ctrl_c_ends_an_mcp_server_at_once(both: Both) -> None:
    ana = both.there.client
    process = subprocess.Popen(
        [BIN / "lattice", "remote", "mcp"],
        cwd=ana.dir,
        env=ana.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    process.stdin.write(
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}).encode() + b"\n"
    )
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["id"] == 1
    process.send_signal(signal.SIGINT)
    process.wait(10)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_without_the_package_the_command_names_what_to_install(both: Both, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    done = subprocess.run(
        [BIN / "lattice", "remote", "mcp"],
        cwd=both.there.client.dir,
        env={**both.there.client.env, "PYTHONPATH": str(tmp_path)},
        input=b"",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == "Error: the MCP server needs another package: pip install 'lattice-remote[mcp]'\n"
