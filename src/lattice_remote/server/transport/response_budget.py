"""Memory of answers that clients over HTTP have not taken yet: bounded for each token, and for all together (I10).

A body is counted from the moment in which it was made to the end of its response, once for however many responses it
is shared by. Before a large one is made its request waits for room, so a token holds at most ``answer_bytes_per_token``
and one answer of each of its projects; small bodies are not counted.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from lattice_remote.errors import Rejected
from lattice_remote.server.config import LimitSettings

__all__ = ["COUNTED_BYTES", "ResponseBudget", "ResponseShare"]

COUNTED_BYTES = 64 * 1024
"""A body that is larger is counted, and sent in pieces of this size."""
_WAIT_S = 30.0
"""How long a request waits for room: three times what a client has that takes nothing."""


class _Bodies:
    """Bodies in memory, each counted once. It is kept as long as it is counted, so no other has its ``id()``."""

    def __init__(self) -> None:
        self.bytes = 0
        self._uses: dict[int, tuple[bytes, int]] = {}

    def has(self, body: bytes) -> bool:
        return id(body) in self._uses

    def add(self, body: bytes) -> None:
        _, uses = self._uses.get(id(body), (body, 0))
        self._uses[id(body)] = body, uses + 1
        if not uses:
            self.bytes += len(body)

    def remove(self, body: bytes) -> None:
        _, uses = self._uses.pop(id(body))
        if uses > 1:
            self._uses[id(body)] = body, uses - 1
        else:
            self.bytes -= len(body)


@contextmanager
def _in_time() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        why = "answers to this token were not taken: read what you have asked for, then try again"
        raise Rejected(why, code="REMOTE_BUSY") from None


class ResponseBudget:
    """The bodies that all responses of a server hold. Belongs to the event loop's thread."""

    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._all = _Bodies()
        self._of: dict[str, _Bodies] = {}
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)  # by token
        self._making: dict[str, asyncio.Lock] = {}  # by token: there are no more than were ever made

    @property
    def total_bytes(self) -> int:
        """What all responses hold."""
        return self._all.bytes

    def of(self, token_id: str) -> int:
        """Return how many bytes the responses of a token hold."""
        return self._of[token_id].bytes if token_id in self._of else 0

    def has_room(self, token_id: str) -> bool:
        """Tell whether one more answer may be made for a token; one that holds nothing always may have one."""
        held = self.of(token_id)
        is_below = held < self._limits.answer_bytes_per_token and self.total_bytes < self._limits.answer_bytes
        return not held or is_below

    def has(self, token_id: str, body: bytes) -> bool:
        """Tell whether a response of this token holds this very body already."""
        return token_id in self._of and self._of[token_id].has(body)

    async def room(self, token_id: str) -> None:
        """Wait until ``has_room``.

        Raises:
            Rejected: REMOTE_BUSY, there was none in time.
        """
        with _in_time():
            async with asyncio.timeout(_WAIT_S):
                while not self.has_room(token_id):
                    await self._released(token_id)

    async def _released(self, token_id: str) -> None:
        """Wait until a body of this token, or of another if it was short of the bound of all, is released."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[token_id].append(waiter)
        try:
            await waiter
        finally:
            if waiter in (waiting := self._waiting.get(token_id, [])):
                waiting.remove(waiter)

    @asynccontextmanager
    async def alone(self, token_id: str) -> AsyncIterator[None]:
        """Be the one request of its token that makes an answer.

        Raises:
            Rejected: REMOTE_BUSY, others were before it for too long.
        """
        lock = self._making.setdefault(token_id, asyncio.Lock())
        with _in_time():
            async with asyncio.timeout(_WAIT_S):
                await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def add(self, token_id: str, body: bytes) -> None:
        """Count a body; ``remove`` it when its response is over."""
        self._of.setdefault(token_id, _Bodies()).add(body)
        self._all.add(body)

    def remove(self, token_id: str, body: bytes) -> None:
        """Count a body no longer, and let those go on that wait for room."""
        self._of[token_id].remove(body)
        self._all.remove(body)
        if not self._of[token_id].bytes:
            del self._of[token_id]
        for waiting in tuple(self._waiting) if self.total_bytes < self._limits.answer_bytes else (token_id,):
            for waiter in self._waiting.pop(waiting, ()):
                if not waiter.done():
                    waiter.set_result(None)


class ResponseShare:
    """What the response to one request holds of the budget. ``close()`` it when the response is over."""

    def __init__(self, budget: ResponseBudget) -> None:
        self._budget = budget
        self._bodies: list[bytes] = []
        self.token_id = ""
        """Who asks, once that is known; what is sent to others is small."""

    @property
    def has_room(self) -> bool:
        """Whether an answer may be made now; of one that has several parts, all may that follow the first."""
        return bool(self._bodies) or self._budget.has_room(self.token_id)

    async def room(self) -> None:
        """Wait until ``has_room``; otherwise as ``ResponseBudget.room``."""
        if not self.has_room:
            await self._budget.room(self.token_id)

    @asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """Make an answer of a size that is not known before, alone of its token; ``hold`` it before the end."""
        async with self._budget.alone(self.token_id):
            await self.room()
            yield

    def may_hold(self, body: bytes) -> bool:
        """Tell whether the response may have this body, which is in memory already."""
        return len(body) <= COUNTED_BYTES or self.has_room or self._budget.has(self.token_id, body)

    def hold(self, body: bytes) -> None:
        """Count a body that the response is to be made of, once."""
        if len(body) > COUNTED_BYTES and self.token_id and not any(body is held for held in self._bodies):
            self._bodies.append(body)
            self._budget.add(self.token_id, body)

    def drop(self, body: bytes) -> None:
        """Count a body no longer, which the response is not to be made of after all. Idempotent."""
        if any(body is held for held in self._bodies):
            self._bodies = [held for held in self._bodies if held is not body]
            self._budget.remove(self.token_id, body)

    def close(self) -> None:
        """Count nothing any longer. Idempotent."""
        while self._bodies:
            self._budget.remove(self.token_id, self._bodies.pop())
