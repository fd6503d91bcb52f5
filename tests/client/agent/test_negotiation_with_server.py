"""Capabilities and versions of the server; repeated requests."""

from pathlib import Path

import pytest
from client_kit import ask, ready, run, until
from fake_server import FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client.agent.service import Service
from lattice_remote.errors import RemoteError
from lattice_remote.protocol.messages import CAPABILITIES, Call, ClientFrame, Log, Run


@pytest.mark.parametrize("missing", ["", *CAPABILITIES])
async def test_a_call_is_sent_only_to_a_server_with_its_surface(
    server: FakeServer, service: Service, directory: Path, missing: str
) -> None:
    server.capabilities = [name for name in server.capabilities if name != missing]
    await ready(service)
    call = {"surface": "mcp", "name": "tasks/x.json", "payload": '{"x": 1}', "files": []}
    if missing == "call:mcp":
        with pytest.raises(RemoteError, match=r"does not offer mcp: install lattice-remote\[mcp\] on the server"):
            await ask(service, "call", id="1" * 32, **call)
        assert not [frame for frame in server.frames if isinstance(frame, Call)]
    else:
        answer = await ask(service, "call", id="1" * 32, **call)
        assert (answer["status"], answer["payload"], answer["seq"]) == (200, '{"x": 1}', server.seq)
        assert (directory / "tasks/x.json").read_bytes() == b'{"x": 1}'


async def test_status_says_which_side_to_upgrade(server: FakeServer, service: Service) -> None:
    await ready(service)
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


async def test_a_repeated_request_states_its_age(server: FakeServer, service: Service) -> None:
    """I6."""
    server.cut_before_reply = 2
    assert (await run(service, "put", "tasks/x.json", "x"))["exit_code"] == 0
    ages = [frame.age_s for frame in server.frames if isinstance(frame, Run)]
    assert ages[0] == 0 and 0 < ages[1] < ages[2] < 10
    assert len({frame.id for frame in server.frames if isinstance(frame, Run)}) == 1


async def test_a_repeated_call_states_its_age(server: FakeServer, service: Service) -> None:
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


async def test_a_request_that_an_earlier_agent_may_have_sent_is_reported_at_once(
    server: FakeServer, service: Service
) -> None:
    """I6."""
    await ready(service)
    from lattice_remote.client.agent_runtime import boot_time

    await run(service, "put", "tasks/x.json", "x", first_sent_at=boot_time() - 100)
    (sent,) = [frame for frame in server.frames if isinstance(frame, Run)]
    assert 100 <= sent.age_s < 110


async def test_an_endless_log_is_a_violation(server: FakeServer, service: Service) -> None:
    async def misbehave(connection: ServerConnection, frame: ClientFrame) -> bool:
        from lattice_remote.protocol.messages import LogPage, encode

        if isinstance(frame, Log):
            await connection.send(encode(LogPage(frame.id, [], 7)))
        return isinstance(frame, Log)

    server.misbehave = misbehave  # type: ignore[assignment]
    await ready(service)
    with pytest.raises(RemoteError, match="are not consecutive"):
        await ask(service, "log", task="", limit=5)
