"""Memory budget of unread HTTP responses, per token and in total (I10).

A body is counted from its creation to the end of its response, once for all responses that share it. A request waits
for room before a large body is made, so a token holds at most ``answer_bytes_per_token`` and one response of each of
its projects.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lattice_remote.errors import Rejected
from lattice_remote.server.config import LimitSettings

__all__ = ["COUNTED_BYTES", "ResponseBudget", "ResponseShare"]

COUNTED_BYTES = 64 * 1024
"""Larger bodies are counted, and sent in such pieces."""
_WAIT_S = 30.0
"""Three times the limit of a client that does not read."""


class _Bodies:
    """Bodies in memory, each counted once. A counted body is referenced, so no other has its ``id()``."""

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


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_WAIT_S):
            yield
    except TimeoutError:
        why = "responses to this token are unread: read them, then try again"
        raise Rejected(why, code="REMOTE_BUSY") from None


class ResponseBudget:
    def __init__(self, limits: LimitSettings) -> None:
        self._limits = limits
        self._all = _Bodies()
        self._of: dict[str, _Bodies] = {}
        self._waiting: defaultdict[str, list[asyncio.Future[None]]] = defaultdict(list)  # by token
        self._making: dict[str, asyncio.Lock] = {}  # by token: bounded by the number of tokens

    @property
    def total_bytes(self) -> int:
        return self._all.bytes

    def of(self, token_id: str) -> int:
        return self._of[token_id].bytes if token_id in self._of else 0

    def has_room(self, token_id: str) -> bool:
        """Return whether a token may have one more response; one that holds nothing may."""
        held = self.of(token_id)
        is_below = held < self._limits.answer_bytes_per_token and self.total_bytes < self._limits.answer_bytes
        return not held or is_below

    def has(self, token_id: str, body: bytes) -> bool:
        """Return whether a response of this token holds this very body."""
        return token_id in self._of and self._of[token_id].has(body)

    async def room(self, token_id: str) -> None:
        """Wait until ``has_room``. Raises Rejected (REMOTE_BUSY) after ``_WAIT_S``."""
        async with _in_time():
            while not self.has_room(token_id):
                await self._released(token_id)

    async def _released(self, token_id: str) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[token_id].append(waiter)
        try:
            await waiter
        finally:
            if waiter in (waiting := self._waiting.get(token_id, [])):
                waiting.remove(waiter)

    @asynccontextmanager
    async def alone(self, token_id: str) -> AsyncIterator[None]:
        """Be the only request of its token that makes a response; raises as ``room``."""
        lock = self._making.setdefault(token_id, asyncio.Lock())
        async with _in_time():
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def add(self, token_id: str, body: bytes) -> None:
        self._of.setdefault(token_id, _Bodies()).add(body)
        self._all.add(body)

    def remove(self, token_id: str, body: bytes) -> None:
        self._of[token_id].remove(body)
        self._all.remove(body)
        if not self._of[token_id].bytes:
            del self._of[token_id]
        for waiting in tuple(self._waiting) if self.total_bytes < self._limits.answer_bytes else (token_id,):
            for waiter in self._waiting.pop(waiting, ()):
                if not waiter.done():
                    waiter.set_result(None)


class ResponseShare:
    """Share of one response; ``close()`` it."""

    def __init__(self, budget: ResponseBudget) -> None:
        self._budget = budget
        self._bodies: list[bytes] = []
        self.token_id = ""
        """Once known; responses without one are small."""

    @property
    def has_room(self) -> bool:
        """Whether a body may be made now; later parts always may."""
        return bool(self._bodies) or self._budget.has_room(self.token_id)

    async def room(self) -> None:
        if not self.has_room:
            await self._budget.room(self.token_id)

    @asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """Make a body of unknown size, alone of its token; ``hold`` it before the end."""
        async with self._budget.alone(self.token_id):
            await self.room()
            yield

    def may_hold(self, body: bytes) -> bool:
        """Return whether the response may share this body in memory."""
        return len(body) <= COUNTED_BYTES or self.has_room or self._budget.has(self.token_id, body)

    def hold(self, body: bytes) -> None:
        if len(body) > COUNTED_BYTES and self.token_id and not any(body is held for held in self._bodies):
            self._bodies.append(body)
            self._budget.add(self.token_id, body)

    def hold_if_room(self, body: bytes) -> bool:
        """Count a body made without waiting; return False if there is no room."""
        has_room = len(body) <= COUNTED_BYTES or self.has_room
        if has_room:
            self.hold(body)
        return has_room

    def hold_only(self, body: bytes) -> None:
        """Count the body that is sent, and nothing that it was made from."""
        self.hold(body)
        for held in [held for held in self._bodies if held is not body]:
            self.drop(held)

    def drop(self, body: bytes) -> None:
        if any(body is held for held in self._bodies):
            self._bodies = [held for held in self._bodies if held is not body]
            self._budget.remove(self.token_id, body)

    def close(self) -> None:
        while self._bodies:
            self._budget.remove(self.token_id, self._bodies.pop())
