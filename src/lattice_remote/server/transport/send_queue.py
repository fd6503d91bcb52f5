"""Send queue of one client, and the budget of all queues of a token (I10).

A queue is bounded, written once per loop tick, and holds wire bytes: one change for a thousand clients is one object. A
client with too much outstanding, or one that reads nothing for too long, is cut and catches up after reconnecting.
"""

import asyncio
import contextlib
import fcntl
import logging
import sys
import termios
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

__all__ = [
    "MAX_PENDING_BYTES",
    "MAX_UNSENT_BYTES_PER_TOKEN",
    "STALL_DEADLINE_S",
    "SendBudget",
    "SendQueue",
    "payload_of",
    "websocket_frame",
]

MAX_PENDING_BYTES = 16 * 1024 * 1024
"""Outstanding bytes at which the client is cut. One frame may always be queued, however large."""
STALL_DEADLINE_S = 10.0
"""Time without a byte read after which the client is cut."""
_WRITE_BYTES = 256 * 1024
_JOINED_BYTES = 16 * 1024
"""Frames up to this size are written together. Larger ones are not copied: joined, each client would have its copy."""
_CHECK_S = 1.0

_log = logging.getLogger(__name__)


def websocket_frame(payload: bytes) -> bytes:
    """Return a whole binary WebSocket message from a server (RFC 6455 section 5.2): final, unmasked, one frame."""
    size = len(payload)
    if size < 126:
        return b"\x82" + bytes((size,)) + payload
    if size < 1 << 16:
        return b"\x82\x7e" + size.to_bytes(2) + payload
    return b"\x82\x7f" + size.to_bytes(8) + payload


def payload_of(frame: bytes) -> bytes:
    """Return the payload of a frame made by ``websocket_frame``."""
    return frame[{126: 4, 127: 10}.get(frame[1], 2) :]


class SendQueue:
    """The queue in front of one transport; the owner passes on ``pause()``, ``resume()`` and ``close()``.

    ``log`` is called with the reason when the client is cut.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        name: str,
        *,
        max_bytes: int = MAX_PENDING_BYTES,
        stall_deadline_s: float = STALL_DEADLINE_S,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._log = log or partial(_log.warning, "%s %s: cut", name)
        self._transport = transport
        self._max_bytes = max_bytes
        self._deadline_s = stall_deadline_s
        self._loop = asyncio.get_running_loop()
        self._frames: deque[bytes] = deque()
        self._bytes = 0  # in _frames; the transport's own buffer comes on top
        self._written = 0  # bytes since the last query
        self._paused = False
        self._flush_due = False
        self._closed = False
        self._left = 0  # bytes in the transport at its last progress
        self._taken_at = 0.0  # time of that progress
        self._check: asyncio.TimerHandle | None = None
        self._room: list[asyncio.Future[None]] = []
        self.drained: Callable[[], None] = lambda: None
        """Called when everything queued is with the transport and it wants more, and after the end."""

    @property
    def pending_bytes(self) -> int:
        """Bytes that the client's kernel has not taken yet."""
        return self._bytes + (0 if self._closed else self._transport.get_write_buffer_size())

    def take_written(self) -> int:
        """Return the bytes given to the transport since the last call."""
        written, self._written = self._written, 0
        return written

    def push(self, frame: bytes) -> None:
        """Queue one frame, to be written at the end of this loop tick; a no-op after the connection's end."""
        if self._closed:
            return
        if self.pending_bytes >= self._max_bytes:
            self._cut(f"has not taken {self.pending_bytes} bytes")
            return
        self._frames.append(frame)
        self._bytes += len(frame)
        if not self._flush_due and not self._paused:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def room(self) -> None:
        """Wait until the transport has everything queued and wants more; return at once after the end."""
        if self._closed or not (self._frames or self._paused):
            return
        waiter = self._loop.create_future()
        self._room.append(waiter)
        await waiter

    def pause(self) -> None:
        """Stop writing: the transport's buffer is full."""
        self._paused = True
        self._left = self._untaken()
        self._taken_at = self._loop.time()
        if self._check is None:
            self._check = self._loop.call_later(min(_CHECK_S, self._deadline_s / 4), self._check_progress)

    def resume(self) -> None:
        """Continue writing: the transport's buffer has drained."""
        self._paused = False
        self._flush()

    def finish(self) -> None:
        """Hand everything to the transport, regardless of its buffer; the owner then sends its goodbye and closes."""
        while self._frames:
            self._transport.write(self._next_write())
        self.close()

    def close(self) -> None:
        """Drop the queue: the connection is over. Idempotent."""
        self._closed = True
        self._frames.clear()
        self._bytes = 0
        if self._check is not None:
            self._check.cancel()
            self._check = None
        self._wake()

    def _flush(self) -> None:
        self._flush_due = False
        while self._frames and not self._paused and self._transport.get_write_buffer_size() < _WRITE_BYTES:
            self._transport.write(self._next_write())
        if self._paused:
            return
        if not self._frames and self._transport.get_write_buffer_size() <= self._transport.get_write_buffer_limits()[1]:
            self._wake()
        elif not self._flush_due:
            # uvloop writes, and pauses this queue if needed, at the end of the tick: continue after that.
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _next_write(self) -> bytes:
        """Take small frames of up to ``_WRITE_BYTES`` together, or one large one."""
        first = self._frames.popleft()
        size = len(first)
        batch = [first]
        while size < _WRITE_BYTES and self._frames and len(batch[-1]) <= _JOINED_BYTES >= len(self._frames[0]):
            batch.append(self._frames.popleft())
            size += len(batch[-1])
        self._bytes -= size
        self._written += size
        return first if len(batch) == 1 else b"".join(batch)

    def _wake(self) -> None:
        self.drained()
        for waiter in self._room:
            if not waiter.done():
                waiter.set_result(None)
        self._room.clear()

    def _check_progress(self) -> None:
        """Cut a client that reads nothing. The keepalive does not: a ping waits behind the queue."""
        self._check = None
        if not self._paused or self._closed:
            return
        left = self._untaken()
        now = self._loop.time()
        if left < self._left:
            self._taken_at = now
        self._left = left
        if now - self._taken_at >= self._deadline_s:
            self._cut(f"has taken nothing for {self._deadline_s:g} s")
        else:
            self._check = self._loop.call_later(min(_CHECK_S, self._deadline_s / 4), self._check_progress)

    def _untaken(self) -> int:
        """Return how many of the bytes given to the transport the client has not acknowledged.

        Bytes in the kernel count: it takes no more until a good part of its queue is sent, which takes a slow client
        longer than the deadline.
        """
        left = self._transport.get_write_buffer_size()
        descriptor = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no socket, or it is closed
            queued = fcntl.ioctl(descriptor.fileno(), termios.TIOCOUTQ, bytes(4))
            left += int.from_bytes(queued, sys.byteorder)
        return left

    def _cut(self, why: str) -> None:
        self._log(why)
        self.close()
        self._transport.abort()


MAX_UNSENT_BYTES_PER_TOKEN = 128 * 1024 * 1024
"""Over all connections of a token. A token with no unread bytes always gets one answer of any size."""


class SendBudget:
    """Unread bytes by token. Belongs to the event loop's thread."""

    def __init__(self, max_bytes: int = MAX_UNSENT_BYTES_PER_TOKEN) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}

    def held(self, token_id: str) -> int:
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
