"""Frames received from one socket, in a bounded queue."""

import asyncio
from collections import deque
from collections.abc import Callable

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from lattice_remote.errors import ConnectionFailed, ProtocolError, RemoteError
from lattice_remote.protocol.messages import ServerFrame, decode_server_frame

__all__ = ["Item", "ReceiveQueue", "closing_error", "read_frames"]

MAX_FRAMES = 128
MAX_BYTES = 64 * 1024 * 1024
MAX_FRAGMENTS = 1024
"""Most fragments of a message: empty ones cost the sender nothing."""
_VIOLATIONS = {1002, 1007, 1009}
"""Close codes with which the library reports a violation of WebSocket by the peer."""

Item = ServerFrame | RemoteError
"""A frame, or the error that ended the connection after the frames before it."""


class ReceiveQueue:
    """Bounded queue between the socket's reader and the session; one producer, one consumer."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Return whether the reader must wait because the session is slow."""
        return len(self._items) >= MAX_FRAMES or self._bytes >= MAX_BYTES

    async def put(self, item: Item, size: int = 0) -> None:
        """Add an item of ``size`` bytes on the wire, once there is room."""
        while self.is_full:
            await self._next_change()
        self._items.append(item)
        self._bytes += size
        self._changed.set()

    async def take(self) -> list[Item]:
        """Wait for at least one item and return all."""
        while not self._items:
            await self._next_change()
        items = list(self._items)
        self._items.clear()
        self._bytes = 0
        self._changed.set()
        return items

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def read_frames(socket: ClientConnection, queue: ReceiveQueue, on_heard: Callable[[], None]) -> None:
    """Decode frames into ``queue``, apart from their processing: a slow disk must not look like a silent server.

    The connection's end goes through the queue too: the frames before it, such as a goodbye, come first.
    """
    try:
        while True:
            data = await _message(socket)
            on_heard()
            await queue.put(decode_server_frame(data), len(data))
    except ConnectionClosed as closed:
        await queue.put(closing_error(closed))
    except ProtocolError as violation:
        await queue.put(violation)


def closing_error(closed: ConnectionClosed) -> RemoteError:
    """Return the error for a closed connection: a violation noticed here, or the peer's close."""
    if closed.sent is not None and closed.rcvd is None and closed.sent.code in _VIOLATIONS:
        return ProtocolError(f"the server broke the protocol: {closed.sent.reason}")
    reason = f": {closed.rcvd.reason}" if closed.rcvd is not None and closed.rcvd.reason else ""
    return ConnectionFailed(f"the connection was closed{reason}")


async def _message(socket: ClientConnection) -> bytes:
    """Return the next message.

    Raises:
        ProtocolError: it is text, or has too many fragments.
        ConnectionClosed: the connection has ended.
    """
    pieces: list[bytes] = []
    async for piece in socket.recv_streaming():
        if isinstance(piece, str):
            raise ProtocolError("a text message; frames are binary")
        pieces.append(piece)
        if len(pieces) > MAX_FRAGMENTS:
            raise ProtocolError(f"a message in more than {MAX_FRAGMENTS} pieces")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
