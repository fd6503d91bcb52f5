"""What has come and was not yet taken: bounded in frames and in bytes, so that a fast server can't fill the memory."""

import asyncio
from collections import deque

from lattice_remote.errors import RemoteError
from lattice_remote.protocol.messages import ServerFrame

__all__ = ["Inbox", "Item"]

MAX_FRAMES = 128
MAX_BYTES = 64 * 1024 * 1024

Item = ServerFrame | RemoteError
"""A frame, or what ended the connection after the frames before it."""


class Inbox:
    """One reader puts, one taker takes; a put waits while the inbox is full."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether the reader has to wait: we are slow, not the server."""
        return len(self._items) >= MAX_FRAMES or self._bytes >= MAX_BYTES

    async def put(self, item: Item, size: int = 0) -> None:
        """Add an item of ``size`` bytes on the wire, once there is room."""
        while self.is_full:
            await self._next_change()
        self._items.append(item)
        self._bytes += size
        self._changed.set()

    async def take(self) -> list[Item]:
        """Return everything that is there, at least one item."""
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
