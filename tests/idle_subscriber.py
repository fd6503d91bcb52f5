"""A WebSocket client that follows at almost no cost, so that hundreds of them leave the machine to the server.

It answers pings, counts frames, and keeps the last change, whose number it decodes on request.
"""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

from lattice_remote.protocol.messages import (
    CAPABILITIES,
    SUBPROTOCOL,
    Change,
    Hello,
    Welcome,
    decode_server_frame,
    encode,
)

__all__ = ["Listener", "listeners"]

_TEXT_OR_BINARY, _CLOSE, _PING, _PONG = (1, 2), 8, 9, 10


class Listener(asyncio.Protocol):
    """One connection; made by ``listeners``."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._received = bytearray()
        self._greeted = False
        self._last = b""
        self.transport: asyncio.Transport
        self.frames = 0
        """How many messages have come."""
        self.is_lost = False
        """Whether the connection has ended."""

    @property
    def seq(self) -> int:
        """The number of the last change that has come, or of the head when it greeted."""
        frame = decode_server_frame(self._last)
        if isinstance(frame, Welcome):
            return frame.head
        assert isinstance(frame, Change), frame
        return frame.seq

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass of it
        self.transport.write(self._head)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._greeted:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            assert received.startswith(b"HTTP/1.1 101"), bytes(received)
            del received[: end + 4]
            self._greeted = True
            hello = Hello([1], "listener", "", list(CAPABILITIES))
            self.transport.write(_masked(2, encode(hello)))
        start = 0
        while (end := _end_of_frame(received, start)) is not None:
            self._take(received[start] & 15, start, end)
            start = end
        del received[:start]

    def _take(self, kind: int, start: int, end: int) -> None:
        if kind in _TEXT_OR_BINARY:
            self.frames += 1
            self._last = bytes(self._received[_payload(self._received, start) : end])
        elif kind == _PING:
            self.transport.write(_masked(_PONG, bytes(self._received[_payload(self._received, start) : end])))
        elif kind == _CLOSE:
            self.transport.abort()

    def close(self) -> None:
        """End the connection at once."""
        self.transport.abort()


def _payload(data: bytearray, start: int) -> int:
    """Return where the payload of a frame from a server begins."""
    length = data[start + 1]
    return start + (2 if length < 126 else 4 if length == 126 else 10)


def _end_of_frame(data: bytearray, start: int) -> int | None:
    if len(data) < start + 2:
        return None
    begin = _payload(data, start)
    if len(data) < begin:
        return None
    length = data[start + 1] if data[start + 1] < 126 else int.from_bytes(data[start + 2 : begin])
    return begin + length if len(data) >= begin + length else None


def _masked(kind: int, payload: bytes) -> bytes:
    """Return a frame from a client, masked with zeros, which loopback allows."""
    size = len(payload)
    assert size < 1 << 16, "a listener says little"
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes((0x80 | kind,)) + length + bytes(4) + payload


@asynccontextmanager
async def listeners(count: int, url: str, token: str, *, slug: str = "board") -> AsyncIterator[list[Listener]]:
    """Yield ``count`` listeners, each with its Welcome; they end with the block."""
    parts = urlsplit(url)
    head = (
        f"GET /projects/{slug}/ws HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\nAuthorization: Bearer {token}\r\n\r\n"
    ).encode()
    made: list[Listener] = []
    try:
        for _ in range(count):
            _, listener = await asyncio.get_running_loop().create_connection(
                lambda: Listener(head), parts.hostname, parts.port
            )
            made.append(listener)
        async with asyncio.timeout(60):
            while not all(listener.frames for listener in made):
                assert not any(listener.is_lost for listener in made), "the server has refused one"
                await asyncio.sleep(0.02)
        yield made
    finally:
        for listener in made:
            listener.close()
