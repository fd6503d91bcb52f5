"""Memory budget per token of what WebSocket clients have not read (I10).

It counts what is sent to one client only: answers over 64 KiB and pieces of files. Clients share the
changes, which the ``SendQueue`` of each connection bounds.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["MAX_UNSENT_BYTES_PER_TOKEN", "SendBudget"]

MAX_UNSENT_BYTES_PER_TOKEN = 128 * 1024 * 1024
"""Over all connections of a token. A token with no unread bytes always gets one answer of any size."""


class SendBudget:
    """Unread bytes by token. Belongs to the event loop's thread."""

    def __init__(self, max_bytes: int = MAX_UNSENT_BYTES_PER_TOKEN) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    def held(self, token_id: str) -> int:
        """Return the unread bytes of a token."""
        return self._held[token_id]

    def take(self, token_id: str, size: int) -> bool:
        """Count ``size`` bytes; return False, and count nothing, if that exceeds the bound."""
        if not self._fits(token_id, size):
            return False
        self._held[token_id] += size
        return True

    def give_back(self, token_id: str, size: int) -> None:
        """Subtract ``size`` bytes and wake the waiters that now fit."""
        self._held[token_id] -= size
        if not self._held[token_id]:
            del self._held[token_id]
        waiting = self._waiting.get(token_id, deque())
        while waiting and (waiting[0][1].done() or self._fits(token_id, waiting[0][0])):
            wanted, waiter = waiting.popleft()
            if not waiter.done():
                self._held[token_id] += wanted
                waiter.set_result(None)
        if not waiting:
            self._waiting.pop(token_id, None)

    @asynccontextmanager
    async def reserved(self, token_id: str, size: int) -> AsyncIterator[None]:
        """Wait for room, first come, first served, and count ``size`` bytes during the block."""
        if token_id in self._waiting or not self.take(token_id, size):
            await self._turn(token_id, size)
        try:
            yield
        finally:
            self.give_back(token_id, size)

    async def _turn(self, token_id: str, size: int) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(token_id, deque()).append((size, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # its turn came in the same tick
                self.give_back(token_id, size)
            raise

    def _fits(self, token_id: str, size: int) -> bool:
        return not self._held[token_id] or self._held[token_id] + size <= self._max_bytes
