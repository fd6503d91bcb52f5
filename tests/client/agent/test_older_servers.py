"""This client against servers of other versions: less is possible, nothing breaks, and it says whom to upgrade."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from client_kit import PLAN, ask, run, tree, until
from fake_server import TOKEN, FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client.agent.service import Service
from lattice_remote.errors import RemoteError
from lattice_remote.protocol.messages import CAPABILITIES, Call, ClientFrame, Log, Put, Run
from lattice_remote.protocol.operations import AnnounceFile, DeleteFile, MoveFile, PutFile, digest_of


@pytest.fixture(params=CAPABILITIES)
async def missing(request: pytest.FixtureRequest, server: FakeServer) -> str:
    """A capability that the server does not have."""
    server.capabilities.remove(request.param)
    return str(request.param)


@pytest.fixture
async def client(missing: str, directory: Path) -> AsyncIterator[Service]:
    service = Service(str(directory))
    service.start(TOKEN)
    yield service
    await service.close()


def write_without(server: FakeServer, capability: str) -> None:
    """Change files in every way that such a server has."""
    big = os.urandom(3000)
    log = server.files.get("events/task_2.jsonl", b"")
    if capability == "append":
        server.change(PutFile("events/task_2.jsonl", log + b"line\n"))
    else:
        server.append("events/task_2.jsonl", b"line\n")
    server.put("tasks/task_2.json", b"two")
    if capability == "move":
        server.change(DeleteFile("tasks/task_2.json"), PutFile("archive/tasks/task_2.json", b"two"))
    else:
        server.change(MoveFile("tasks/task_2.json", "archive/tasks/task_2.json", digest_of(b"two")))
    server.files["artifacts/payload/big"] = big
    announced = AnnounceFile("artifacts/payload/big", len(big), digest_of(big))
    server.change(PutFile("artifacts/payload/big", big) if capability == "announce" else announced)


async def test_a_server_that_offers_less_is_followed_and_takes_commands(
    server: FakeServer, client: Service, directory: Path, missing: str
) -> None:
    """I3."""
    assert (await ask(client, "ready"))["current"]
    for _ in range(3):
        write_without(server, missing)
        assert (await run(client, "put", "tasks/task_3.json", "three"))["exit_code"] == 0
        await until(lambda: tree(directory) == server.files)
    assert server.greetings == 1, "nothing it did was taken for a violation"


async def test_an_edit_is_kept_where_the_server_takes_none(
    server: FakeServer, client: Service, directory: Path, missing: str
) -> None:
    server.files[PLAN] = b"# Plan\n"
    await ask(client, "ready")
    (directory / PLAN).write_bytes(b"# Mine\n")
    answer = await ask(client, "push")
    assert (directory / PLAN).read_bytes() == b"# Mine\n"
    if missing == "put-text":
        assert [sent["outcome"] for sent in answer["sent"]] == ["refused"]
        assert "does not accept edited plans and notes: upgrade the server" in answer["notices"][0]
        assert not [frame for frame in server.frames if isinstance(frame, Put)]
        assert (await run(client, "put", "tasks/task_3.json", "three"))["exit_code"] == 0
    else:
        assert server.files[PLAN] == b"# Mine\n"


async def test_the_log_of_a_server_that_has_none_is_one_clear_line(
    server: FakeServer, client: Service, missing: str
) -> None:
    await ask(client, "ready")
    write_without(server, missing)
    if missing == "log":
        with pytest.raises(RemoteError, match="does not offer its log: upgrade the server") as refusal:
            await ask(client, "log", task="", limit=2)
        assert refusal.value.code == "REMOTE_VERSION"
        assert not [frame for frame in server.frames if isinstance(frame, Log)]
    else:
        answer = await ask(client, "log", task="", limit=2)
        assert [entry["seq"] for entry in answer["entries"]] == [4, 3] and answer["more"]


async def test_a_call_is_sent_only_to_a_server_that_names_its_surface(
    server: FakeServer, client: Service, directory: Path, missing: str
) -> None:
    await ask(client, "ready")
    call = {"surface": "mcp", "name": "tasks/x.json", "payload": '{"x": 1}', "files": []}
    if missing == "call:mcp":
        with pytest.raises(RemoteError, match=r"cannot run MCP tools: install lattice-remote\[mcp\] on the server"):
            await ask(client, "call", id="1" * 32, **call)
        assert not [frame for frame in server.frames if isinstance(frame, Call)]
    else:
        answer = await ask(client, "call", id="1" * 32, **call)
        assert (answer["status"], answer["payload"], answer["seq"]) == (200, '{"x": 1}', server.seq)
        assert (directory / "tasks/x.json").read_bytes() == b'{"x": 1}'


async def test_status_says_which_side_to_upgrade(server: FakeServer, service: Service) -> None:
    await ask(service, "ready")
    versions = (await ask(service, "status"))["versions"]
    assert versions["server"]["lattice-tracker"] == "0"
    assert versions["differences"]["lattice-tracker"] == "0 is older: upgrade the server"
    server.lattice_version = "99.1"
    server.cut()
    await until(lambda: server.greetings == 2)
    await ask(service, "pull")
    here = versions["here"]["lattice-tracker"]
    versions = (await ask(service, "status"))["versions"]
    assert versions["differences"]["lattice-tracker"] == f"{here} is older: upgrade this machine"
    server.lattice_version = here
    server.cut()
    await until(lambda: server.greetings == 3)
    await ask(service, "pull")
    assert "lattice-tracker" not in (await ask(service, "status"))["versions"]["differences"]


async def test_a_request_that_is_sent_again_says_how_old_it_is(server: FakeServer, service: Service) -> None:
    """I6."""
    server.cut_before_reply = 2
    assert (await run(service, "put", "tasks/x.json", "x"))["exit_code"] == 0
    ages = [frame.age_s for frame in server.frames if isinstance(frame, Run)]
    assert ages[0] == 0 and 0 < ages[1] < ages[2] < 10
    assert len({frame.id for frame in server.frames if isinstance(frame, Run)}) == 1


async def test_a_call_that_is_sent_again_says_how_old_it_is(server: FakeServer, service: Service) -> None:
    """I6."""
    server.cut_before_reply = 2
    call = {"surface": "mcp", "name": "tasks/x.json", "payload": "{}", "files": []}
    assert (await ask(service, "call", id="1" * 32, **call))["status"] == 200
    ages = [frame.age_s for frame in server.frames if isinstance(frame, Call)]
    assert ages[0] == 0 and 0 < ages[1] < ages[2] < 10
    server.cut_before_reply = 1000
    with pytest.raises(RemoteError, match="may have taken effect") as lost:
        await ask(service, "call", id="2" * 32, **call)
    assert lost.value.code == "REMOTE_UNKNOWN_OUTCOME"


async def test_a_request_that_an_agent_before_may_have_sent_says_so_at_once(
    server: FakeServer, service: Service
) -> None:
    """I6."""
    await ask(service, "ready")
    from lattice_remote.client.agent_runtime import boot_time

    await run(service, "put", "tasks/x.json", "x", first_sent_at=boot_time() - 100)
    (sent,) = [frame for frame in server.frames if isinstance(frame, Run)]
    assert 100 <= sent.age_s < 110


async def test_a_log_that_does_not_end_is_a_violation(server: FakeServer, service: Service) -> None:
    async def misbehave(connection: ServerConnection, frame: ClientFrame) -> bool:
        from lattice_remote.protocol.codec import encode
        from lattice_remote.protocol.messages import LogPage

        if isinstance(frame, Log):
            await connection.send(encode(LogPage(frame.id, [], 7)))
        return isinstance(frame, Log)

    server.misbehave = misbehave  # type: ignore[assignment]
    await ask(service, "ready")
    with pytest.raises(RemoteError, match="are not consecutive"):
        await ask(service, "log", task="", limit=5)
