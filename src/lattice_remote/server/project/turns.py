"""Fair queue, and a lock whose waiters stand in one: each lane in its own order, all lanes in turn (I10).

So a client that has hundreds of requests under way delays another's next one by one request, not by hundreds.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

__all__ = ["FairLock", "FairQueue"]


class FairQueue[T]:
    """A queue of lanes, such as one for each connection or token. ``None`` is the lane of the server's own items."""

    def __init__(self) -> None:
        self._first: deque[T] = deque()
        self._lanes: dict[Hashable, deque[T]] = {}  # whose turn it is comes first
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def has(self, lane: Hashable) -> bool:
        """Tell whether an item of this lane waits here."""
        return lane in self._lanes

    def add(self, item: T, lane: Hashable) -> None:
        """Add an item behind the others of its lane."""
        self._lanes.setdefault(lane, deque()).append(item)
        self._length += 1

    def add_first(self, item: T) -> None:
        """Add an item before all others: it was taken before."""
        self._first.appendleft(item)
        self._length += 1

    def next(self) -> T:
        """Return the item that ``pop`` would take; there must be one."""
        return self._first[0] if self._first else next(iter(self._lanes.values()))[0]

    def pop(self) -> T:
        """Take the next item; there must be one. Then it is the next lane's turn."""
        self._length -= 1
        if self._first:
            return self._first.popleft()
        name, lane = next(iter(self._lanes.items()))
        del self._lanes[name]
        item = lane.popleft()
        if lane:
            self._lanes[name] = lane
        return item

    def remove(self, item: T) -> None:
        """Take an item out that is no longer wanted. Nothing happens when it is not here."""
        for lane in (self._first, *self._lanes.values()):
            if item in lane:
                lane.remove(item)
                self._length -= 1
        for name in [name for name, lane in self._lanes.items() if not lane]:
            del self._lanes[name]

    def clear(self) -> None:
        """Forget all."""
        self._first.clear()
        self._lanes.clear()
        self._length = 0


class FairLock:
    """A lock that lanes take in turn. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, lane: Hashable) -> AsyncIterator[None]:
        """Hold the lock, once it is this lane's turn."""
        await self._acquire(lane)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, lane: Hashable) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter, lane)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._waiting.remove(waiter)
            else:  # its turn came in the same tick
                self._release()
            raise

    def _release(self) -> None:
        """Give the lock to the next lane; a waiter that was cancelled in this tick is not the next."""
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._is_taken = False
