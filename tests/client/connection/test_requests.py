"""Requests over one connection: early retries, slow servers, earlier refusals, late and duplicate replies."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from client_kit import ask, ready, run, until
from fake_server import FakeServer
from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from lattice_remote.client.agent.service import Service
from lattice_remote.client.connection import connection
from lattice_remote.client.connection.connection import Connection, PendingRequest, expect, refusal_of
from lattice_remote.errors import ConnectionFailed, Rejected
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    Attachment,
    Call,
    ClientFrame,
    Limits,
    Log,
    Put,
    Refused,
    Reply,
    Run,
    Stored,
    Welcome,
    encode,
)


def longest(_low: float, _high: float) -> float:
    return 300.0


async def test_a_command_ends_the_delay_before_the_next_attempt(server: FakeServer, service: Service) -> None:
    await ready(service)
    link = service._connection
    link._backoff.uniform = longest
    await server.stop()
    await until(lambda: link.failed_attempts > 0)
    await server.start()
    reply = await link.send_request(Run(secrets.token_hex(16), ["put", "tasks/x.json", "x"]))
    assert isinstance(reply, Reply) and server.files["tasks/x.json"] == b"x"


async def test_a_connected_command_may_take_longer_than_a_lost_connection(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ready(service)
    monkeypatch.setattr(connection, "SENT_PATIENCE_S", 0.01)
    monkeypatch.setattr(connection, "UNSENT_PATIENCE_S", 0.01)
    looks = 0
    give_up = Connection._give_up

    def counted(link: Connection, pending: Any, failed_before: int) -> None:
        nonlocal looks
        looks += 1
        if looks == 4:  # 0.1 s apart
            server.slow.set()
        give_up(link, pending, failed_before)

    monkeypatch.setattr(Connection, "_give_up", counted)
    assert (await run(service, "slow"))["exit_code"] == 0


@pytest.mark.parametrize("step", ["upgrade", "welcome"])
async def test_a_server_that_has_just_started_may_be_slow(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An accepted connection is not reported as refused because of the previous attempt."""
    await ready(service)
    link, release = service._connection, asyncio.Event()
    await server.stop()
    await until(lambda: link.error is not None and "refused" in link.error.message)
    check, give_up, looks = server._check, Connection._give_up, 0

    async def late_check(connection: ServerConnection, request: Request) -> Response | None:
        await release.wait()
        return check(connection, request)

    async def late_answer(_: ServerConnection, __: ClientFrame) -> bool:
        await release.wait()
        return False

    def counted(link: Connection, pending: Any, failed_before: int) -> None:
        nonlocal looks
        looks += link._is_accepted
        if looks == 4:  # 0.1 s apart
            release.set()
        elif looks:
            monkeypatch.setattr(connection, "UNSENT_PATIENCE_S", 0.01)
        give_up(link, pending, failed_before)

    if step == "upgrade":
        monkeypatch.setattr(server, "_check", late_check)
    else:
        server.misbehave = late_answer
    monkeypatch.setattr(Connection, "_give_up", counted)
    await server.start()
    reply = await link.send_request(Run(secrets.token_hex(16), ["put", "tasks/x.json", "x"]))
    assert isinstance(reply, Reply) and server.files["tasks/x.json"] == b"x"


async def test_a_command_after_a_refusal_connects_once_more(server: FakeServer, service: Service) -> None:
    tokens, server.tokens = server.tokens, {}
    await until(lambda: service._connection.is_refused)
    server.tokens = tokens
    reply = await service._connection.send_request(Run(secrets.token_hex(16), ["put", "tasks/x.json", "x"]))
    assert isinstance(reply, Reply) and server.files["tasks/x.json"] == b"x"


async def test_an_answer_for_a_cancelled_caller_is_discarded(server: FakeServer, service: Service) -> None:
    await ready(service)

    async def answer_early(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Run):
            await connection.send(encode(Reply(frame.id, server.seq + 1, 0, b"", b"")))
        return isinstance(frame, Run)

    server.misbehave = answer_early  # type: ignore[assignment]
    caller = asyncio.ensure_future(service._connection.send_request(Run(secrets.token_hex(16), ["x"])))
    heard_at = service._connection.heard_at
    await until(
        lambda: any(isinstance(frame, Run) for frame in server.frames) and service._connection.heard_at != heard_at
    )
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    server.put("tasks/x.json", b"x")
    await until(lambda: service._replicator.state.position.seq == server.seq)
    await ask(service, "pull")
    assert service._connection.failed_attempts == 0 and service._connection.error is None


async def test_a_duplicate_answer_is_ignored(server: FakeServer, service: Service) -> None:
    await ready(service)

    async def answer_twice(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Run):
            reply = encode(Reply(frame.id, server.seq, 0, b"", b""))
            await connection.send(reply)
            await connection.send(reply)
        return isinstance(frame, Run)

    server.misbehave = answer_twice  # type: ignore[assignment]
    for _ in range(2):
        assert (await run(service, "x"))["exit_code"] == 0
    assert service._connection.failed_attempts == 0 and service._connection.error is None


@pytest.mark.parametrize("is_behind", [False, True])
async def test_a_connection_that_was_current_resets_the_delay(
    server: FakeServer, service: Service, monkeypatch: pytest.MonkeyPatch, is_behind: bool
) -> None:
    """Also a connection that had fallen behind when it was cut."""
    monkeypatch.setattr(connection, "MIN_UPTIME_S", 0.0)
    await ready(service)
    link = service._connection
    link._backoff.streak = 5
    if is_behind:
        monkeypatch.setattr(type(link.session), "is_current", False)
        server.put("tasks/x.json", b"x")
        await until(lambda: service._replicator.state.position.seq == server.seq)
    await server.stop()
    await until(lambda: link.failed_attempts == 1)
    assert link._backoff.streak == 0


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        (lambda transport: transport.write(b"\xf2\x00"), "the server broke the protocol: reserved bits"),
        (lambda transport: transport.abort(), "the connection was closed"),
    ],
    ids=["a frame with reserved bits", "no close frame"],
)
async def test_the_reason_of_a_closed_connection_is_reported(
    server: FakeServer, service: Service, ends: Callable[[asyncio.Transport], None], says: str
) -> None:
    await ask(service, "ready")
    link = service._connection
    link._backoff.uniform = longest
    (connection,) = server.connections
    ends(connection.transport)
    await until(lambda: link.failed_attempts == 1)
    assert link.error is not None and link.error.message.startswith(says)
    await run(service, "put", "tasks/x.json", "x")
    assert server.files["tasks/x.json"] == b"x"


# --- requests refused before they are sent ---

ID = "1" * 32


def welcome(**limits: int) -> Welcome:
    limits = {"max_frame_bytes": 1 << 20, "max_file_bytes": 1 << 20, **limits}
    capabilities = [name for name in CAPABILITIES if not name.startswith("call:")]
    return Welcome(
        *(1, "9.9", "0.2", "web", "human:ana", "e", 0, 0, False), Limits(**limits), capabilities=capabilities
    )


def test_requests_up_to_each_server_limit_are_sent() -> None:
    put = Put(ID, "plans/x.md", b"", b"x" * 100)
    assert refusal_of(put, welcome(max_text_bytes=100)) is None
    refused = refusal_of(put, welcome(max_text_bytes=99))
    assert refused is not None and refused.code == "REMOTE_TOO_LARGE" and "100 bytes" in refused.message
    size = len(encode(put))
    assert refusal_of(put, welcome(max_frame_bytes=size)) is None
    assert refusal_of(put, welcome(max_frame_bytes=size - 1)) is not None
    run = Run(ID, ["attach"], [Attachment(1, "a", b"x" * 50), Attachment(2, "b", b"x" * 60), Attachment(3, "c", None)])
    assert refusal_of(run, welcome(max_file_bytes=60)) is None
    refused = refusal_of(run, welcome(max_file_bytes=59))
    assert refused is not None and "60 of them one file" in refused.message


def test_a_surface_that_the_server_lacks_is_reported() -> None:
    call = Call(ID, "mcp", "create", b"{}", [])
    refused = refusal_of(call, welcome())
    assert refused is not None and refused.code == "REMOTE_VERSION"
    assert "lattice-remote[mcp]" in refused.message and "9.9" in refused.message


def test_an_answer_of_another_kind_may_have_had_an_effect() -> None:
    answer = Stored(ID, 1, "stored")
    assert expect(answer, Stored) is answer
    with pytest.raises(Rejected, match="why") as refused:
        expect(Refused(ID, "REMOTE_FORBIDDEN", "why"), Stored)
    assert refused.value.code == "REMOTE_FORBIDDEN"
    for sent, code in ((False, "REMOTE_UNREACHABLE"), (True, "REMOTE_UNKNOWN_OUTCOME")):
        with pytest.raises(ConnectionFailed, match="unexpected response") as error:
            expect(Reply(ID, 1, 0, b"", b""), Stored, sent=sent)
        assert error.value.code == code


async def test_a_resent_write_states_its_age_and_has_a_longer_timeout() -> None:
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    write, read = PendingRequest(Run(ID, ["list"], []), answer), PendingRequest(Log(ID), answer)
    assert (write.patience_s, write.sent, write.is_write) == (connection.UNSENT_PATIENCE_S, False, True)
    assert write.to_send() is write.frame and write.sent and write.patience_s == connection.SENT_PATIENCE_S
    assert write.first_sent_at is not None
    write.first_sent_at -= 5
    again = write.to_send()
    assert isinstance(again, Run) and again.age_s >= 5 and write.sends == 2
    assert read.to_send() is read.frame is read.to_send()
    assert (read.sent, read.is_write, read.patience_s) == (False, False, connection.UNSENT_PATIENCE_S)
    answer.cancel()
