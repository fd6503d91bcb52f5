"""A raw peer that replies to a WebSocket request with any bytes."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator

__all__ = ["RawServer", "upgraded"]

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class RawServer:
    """Replies to each connection with the output of ``script`` for its request's key, for as long as it is read."""

    def __init__(self, script: Callable[[bytes], Iterator[bytes]]) -> None:
        self.port = 0
        self.sent = 0
        self.connections = 0
        self._script = script
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["RawServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
            assert key is not None
            for piece in self._script(key[1]):
                writer.write(piece)
                await writer.drain()
                self.sent += len(piece)
            await reader.read()
        self._writers.discard(writer)
        writer.transport.abort()


def upgraded(key: bytes, *headers: bytes) -> bytes:
    """Return a valid upgrade response with further header lines."""
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())  # noqa: S324 - what the protocol asks for
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + accept,
        b"Sec-WebSocket-Protocol: lattice.v1",
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"
