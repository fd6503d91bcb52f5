"""Undocumented behaviour of uvicorn and websockets that handoff.py relies on."""

import asyncio
import inspect
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import uvicorn
from harness import Running, make_data, serving, until
from uvicorn.protocols.http import h11_impl
from websockets.asyncio.server import ServerConnection, serve
from websockets.protocol import State
from websockets.server import ServerProtocol

from lattice_remote.protocol.messages import FIRST_FRAME_BYTES
from lattice_remote.server.registry import ProjectRegistry
from lattice_remote.server.transport.websocket import Handoff, Request, Response

shares_a_server = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with serving(*make_data(tmp_path_factory.mktemp("handoff") / "data")) as server:
        yield server


def test_uvicorn_makes_replays_and_hands_over() -> None:
    source = inspect.getsource(h11_impl.H11Protocol.handle_websocket_upgrade)
    for line in ("config=self.config", "server_state=self.server_state", "app_state=self.app_state"):
        assert line in source
    order = [
        "self.connections.discard(self)",
        "connection_made(self.transport)",
        "data_received(",
        "set_protocol(protocol)",
    ]
    assert [source.index(step) for step in order] == sorted(source.index(step) for step in order)


def test_uvicorn_tells_of_each_request_and_response() -> None:
    source = inspect.getsource(h11_impl.H11Protocol)
    assert "self.send_400_response(" in source
    assert '"state": self.app_state.copy()' in source
    assert "protocol = self.ws_protocol_class(" in source
    assert "self.cycle = RequestResponseCycle(" in source
    assert "on_response=self.on_response_complete" in source


def test_uvicorn_asks_for_the_remaining_connections_at_shutdown() -> None:
    assert "connection.shutdown()" in inspect.getsource(uvicorn.Server.shutdown)
    assert "capture_signals" in inspect.getsource(uvicorn.Server.serve)


async def test_websockets_makes_a_server_without_a_port() -> None:
    async def handler(_: ServerConnection) -> None:
        return

    server = serve(handler)
    assert not hasattr(server, "server")
    assert "self.server.is_serving()" in inspect.getsource(ServerConnection.handshake)


def test_websockets_passes_every_frame_on() -> None:
    source = inspect.getsource(ServerConnection.data_received)
    assert "events = self.protocol.events_received()" in source
    assert "self.process_event(event)" in source


def test_websockets_reads_its_limit_for_each_message() -> None:
    assert ServerProtocol(max_size=5).max_message_size == 5


def test_websockets_keeps_what_has_come_of_a_frame_in_its_reader() -> None:
    protocol = ServerProtocol()
    protocol.receive_data(b"GET / HTTP/1.1\r\n")
    protocol.receive_data(b"Upgrade")
    assert len(protocol.reader.buffer) == len("Upgrade")


def test_websockets_writes_close_frames_through_send_data() -> None:
    assert "self.send_data()" in inspect.getsource(ServerConnection.send_context)
    assert "self.send_data()" in inspect.getsource(ServerConnection.data_received)


@shares_a_server
async def test_a_connection_counts_with_uvicorn_until_it_is_lost(running: Running) -> None:
    connections = running.server.server_state.connections
    async with running.connected():
        await until(lambda: any(isinstance(connection, Handoff) for connection in connections))
    await until(lambda: not connections)


@shares_a_server
async def test_a_client_may_say_little_before_it_has_said_hello(running: Running) -> None:
    async with running.connected():
        await until(lambda: len(running.registry._peers) == 1)
        [peer] = running.registry._peers
        connection = peer._connection
        assert connection.protocol.max_message_size == FIRST_FRAME_BYTES
        connection.allow_message_bytes(7)
        assert connection.protocol.max_message_size == 7
        assert connection.protocol.state is State.OPEN
        assert connection.subprotocol == "lattice.v1"


async def silent_until_closed(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(60):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@shares_a_server
async def test_a_head_that_does_not_end_is_cut_and_an_upgraded_connection_is_not(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.server.transport.websocket.HEAD_TIMEOUT_S", 0.3)
    async with running.connected() as client:
        for first in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he"):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(first)
            answers = 1 if first.endswith(b"/he") else 0
            assert (await silent_until_closed(reader)).count(b"HTTP/1.1 200") == answers
            writer.close()
        await (await client.ping())


@shares_a_server
async def test_data_that_is_not_http_is_answered_as_a_bad_request(running: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(b"\x16\x03\x01 no http\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    writer.close()


@shares_a_server
async def test_plain_http_shares_the_port(running: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port, family=socket.AF_INET)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"projects":1' in answer


class Hesitating:
    """A slow check of requests, during which the client continues to send."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = asyncio.Event()
        self.received = 0
        check, data_received = ProjectRegistry.check, Handoff.data_received

        async def slow_check(registry: ProjectRegistry, connection: Handoff, request: Request) -> Response | None:
            await self.release.wait()
            return check(registry, connection, request)

        def counting(connection: Handoff, data: bytes) -> None:
            self.received += len(data)
            data_received(connection, data)

        monkeypatch.setattr(ProjectRegistry, "check", slow_check)
        monkeypatch.setattr(Handoff, "data_received", counting)


def upgrade(token: str) -> bytes:
    return (
        "GET /projects/web/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: lattice.v1\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()


async def test_frames_before_the_answer_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hesitating = Hesitating(monkeypatch)
    async with serving(*make_data(tmp_path / "data")) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(upgrade("ltr_wrong"))
        await until(lambda: hesitating.received)
        before = hesitating.received
        writer.write(b"\x82\x01x")  # unmasked: no client may
        await until(lambda: hesitating.received > before)
        hesitating.release.set()
        assert (await silent_until_closed(reader)).startswith(b"HTTP/1.1 401 ")
        writer.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_is_gone_before_the_answer_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hesitating = Hesitating(monkeypatch)
    async with serving(*make_data(tmp_path / "data")) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(upgrade(running.token))
        await until(lambda: hesitating.received)
        writer.transport.abort()
        await until(lambda: not running.server.server_state.connections)
        hesitating.release.set()
        async with running.connected():
            await until(lambda: running.registry.admission._by_token.total() == 1)
        await until(lambda: not running.registry.admission._by_token)
