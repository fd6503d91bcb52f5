"""One HTTP connection on a stub transport: late heads, and data that is not HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from lattice_remote.server.transport import websocket
from lattice_remote.server.transport.websocket import PlainHttp

Scope = dict[str, Any]


class Transport(asyncio.Transport):
    """Transport that records its output."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1), "sockname": ("192.0.2.2", 80)})
        self.written = b""
        self.unread = 0
        self.is_aborted = self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 0, 65536

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Do nothing: the protocol stays."""

    def pause_reading(self) -> None:
        """Do nothing: the input has ended."""

    def resume_reading(self) -> None:
        """Do nothing: the input has ended."""

    def is_closing(self) -> bool:
        return self.is_aborted or self.is_closed

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_closed = True


class Quota:
    """Quota that records its log lines."""

    address = "192.0.2.1"

    def __init__(self) -> None:
        self.logged: list[str] = []
        self.cut: Any = None
        self.has_left = False

    def log(self, why: str) -> None:
        self.logged.append(why)

    log_cut = log

    def leave(self) -> None:
        self.has_left = True


class Client:
    """A connection whose application begins its response, and ends it on request."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.quota, self.transport = Quota(), Transport()
        config = Config(self._respond, interface="asgi3", lifespan="off", ws="none", log_config=None)
        config.load()
        quota: Any = self.quota
        self.protocol = PlainHttp(config, ServerState(), {}, quota=quota)
        self.protocol.connection_made(self.transport)

    async def _respond(self, scope: Scope, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"o", "more_body": True})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"k"})

    async def begin(self, head: bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") -> None:
        self.protocol.data_received(head)
        async with asyncio.timeout(20):
            while not self.transport.written.endswith(b"o"):  # noqa: ASYNC110 - of the application's task
                await asyncio.sleep(0)

    async def end(self) -> None:
        self.may_end.set()
        async with asyncio.timeout(20):
            while not self.transport.written.endswith(b"ok"):  # noqa: ASYNC110 - of the application's task
                await asyncio.sleep(0)
            await asyncio.sleep(0)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = Client()
    yield made
    made.may_end.set()
    made.protocol.connection_lost(None)
    await asyncio.sleep(0)
    await asyncio.gather(*(made.protocol.tasks or ()), return_exceptions=True)


async def test_data_that_is_not_http_is_answered_and_logged(client: Client) -> None:
    client.protocol.data_received(b"\x16\x03\x01 not HTTP\r\n\r\n")
    assert client.transport.written.startswith(b"HTTP/1.1 400 ")
    assert (client.transport.is_closed, client.transport.is_aborted) == (True, False)
    assert client.quota.logged == ["no HTTP"]


async def test_data_that_is_not_http_does_not_get_into_a_response(client: Client) -> None:
    await client.begin(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    cycle = client.protocol.cycle
    client.protocol.data_received(b"no chunk\r\n\r\n")
    assert client.transport.is_aborted and not client.transport.is_closed
    assert b" 400 " not in client.transport.written and client.transport.written.endswith(b"o")
    assert cycle.disconnected, "the response goes nowhere, without an error"
    assert client.quota.logged == ["no HTTP"]


async def test_data_that_is_not_http_after_a_response_is_answered(client: Client) -> None:
    await client.begin()
    await client.end()
    assert not client.transport.is_closing()
    client.protocol.data_received(b"\x16\x03\x01 not HTTP\r\n\r\n")
    assert client.transport.written.partition(b"ok")[2].startswith(b"HTTP/1.1 400 ")
    assert client.transport.is_closed and not client.transport.is_aborted


async def test_a_head_that_never_comes_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "HEAD_TIMEOUT_S", 0.0)
    client = Client()
    client.protocol.data_received(b"GET / HTTP/1.1\r\nHos")
    async with asyncio.timeout(20):
        while not client.transport.is_aborted:  # noqa: ASYNC110 - of the clock
            await asyncio.sleep(0)
    client.protocol.connection_lost(None)
    assert client.quota.has_left


async def test_a_head_is_not_awaited_during_a_response(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.protocol._deadline is not None
    first = client.protocol._deadline
    await client.begin()
    assert first.cancelled()
    await client.end()
    assert client.protocol._deadline is not first and not client.protocol._deadline.cancelled(), "the next one is"
    monkeypatch.setattr(client.protocol, "_await_head", lambda: awaited.append(True))
    awaited: list[bool] = []
    client.transport.unread, client.protocol._left = 5, 6
    client.protocol._head_overdue()
    assert awaited == [True] and not client.transport.is_aborted, "the response before is being read"
    client.protocol._left = 5
    client.protocol._head_overdue()
    assert awaited == [True] and client.transport.is_aborted


async def test_the_quota_can_cut_the_connection(client: Client) -> None:
    assert not client.transport.is_aborted
    client.quota.cut()
    assert client.transport.is_aborted


# --- a stream past the library ---


async def test_a_stream_ends_with_its_connection(client: Client) -> None:
    lost: list[bool] = []
    await client.begin()
    queue = client.protocol.stream("test", lambda: lost.append(True), max_bytes=100)
    assert client.protocol.take_streamed() == 0
    queue.push(b"chunk")
    queue.flush()
    assert client.transport.written.endswith(b"chunk") and client.protocol.take_streamed() == 5
    client.protocol.pause_writing()
    queue.push(b"more")
    queue.flush()
    assert client.transport.written.endswith(b"chunk")
    client.protocol.resume_writing()
    assert client.transport.written.endswith(b"more") and lost == []
    client.protocol.connection_lost(None)
    assert lost == [True]
    queue.push(b"late")
    queue.flush()
    assert client.transport.written.endswith(b"more")


async def test_a_stream_to_a_client_that_reads_nothing_begins_paused(client: Client) -> None:
    await client.begin()
    client.protocol.pause_writing()
    queue = client.protocol.stream("test", lambda: None, max_bytes=100)
    queue.push(b"chunk")
    queue.flush()
    assert not client.transport.written.endswith(b"chunk")
    client.protocol.resume_writing()
    assert client.transport.written.endswith(b"chunk")


async def test_a_stream_of_a_connection_that_is_gone_is_lost_at_once(client: Client) -> None:
    lost: list[bool] = []
    await client.begin()
    client.transport.is_closed = True
    client.protocol.stream("test", lambda: lost.append(True), max_bytes=100)
    assert lost == [True]


async def test_the_end_of_a_stream_is_written_then_the_connection_is_cut(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(websocket, "CLOSE_TIMEOUT_S", 0.0)
    client.protocol.end_stream()
    assert client.protocol.take_streamed() == 0, "none was begun"
    await client.begin()
    queue = client.protocol.stream("test", lambda: None, max_bytes=100)
    client.protocol.pause_writing()
    queue.push(b"last")
    client.protocol.end_stream()
    assert client.transport.written.endswith(b"last")
    async with asyncio.timeout(20):
        while not client.transport.is_aborted:  # noqa: ASYNC110 - of the clock
            await asyncio.sleep(0)
