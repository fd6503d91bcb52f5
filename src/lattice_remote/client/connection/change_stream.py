"""Stream of a project's changes for a consumer that may block.

A separate thread talks to the server. The waiting changes are bounded: at the limit the connection is closed, and a new
one resumes at the same number once half of them were taken. So a slow consumer holds no server connection half full
(I10), and misses or repeats no change.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

from lattice_remote import __version__
from lattice_remote.client.cache.replicator import ReceiveOutcome
from lattice_remote.client.config import Remote
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import ConnectionFailed, ProtocolError, RemoteError
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import (
    CAPABILITIES,
    PROTOCOL_VERSION,
    Bye,
    Change,
    Follow,
    Followed,
    Hello,
    ServerFrame,
    Welcome,
)
from lattice_remote.protocol.operations import AppendBytes, MergeJson, PutFile

__all__ = ["Arrived", "ChangeStream", "Connected", "Ended", "EpochStarted", "Gone", "Item", "Lost"]

MAX_WAITING = 1000
MAX_WAITING_BYTES = 16 * 1024 * 1024
"""Limit for changes that were received and not taken."""


class Gone(RemoteError):
    """Requested changes are not available. ``oldest`` is the first that is."""

    code = "REMOTE_GONE"


@dataclass(frozen=True)
class Arrived:
    """One change."""

    epoch: str
    change: Change


@dataclass(frozen=True)
class Connected:
    """Connected: the changes after ``position`` follow, up to ``head`` at present."""

    position: Position
    head: int


@dataclass(frozen=True)
class EpochStarted:
    """A new epoch (I7): its changes follow, from the first, in new numbers."""

    epoch: str


@dataclass(frozen=True)
class Lost:
    """Lost connection, with the reason; it is retried."""

    error: RemoteError


@dataclass(frozen=True)
class Ended:
    """End of the stream, with the reason."""

    error: RemoteError


Item = Arrived | Connected | EpochStarted | Lost | Ended


class ChangeStream:
    """Stream of changes. ``start()`` it, ``take()`` until ``Ended``, ``close()`` it from the same thread.

    Args:
        remote, token, named: as for ``Connection``.
        since: the last known change, or only its number in any epoch; None for the head.
    """

    def __init__(
        self, remote: Remote, token: str | None, *, named: Server | None, since: Position | int | None = None
    ) -> None:
        self._remote, self._token, self._named = remote, token, named
        begin = since if isinstance(since, Position) else None
        self._epoch, self._mark = (begin.epoch, begin.mark) if begin else ("", b"")
        self._seq = since.seq if isinstance(since, Position) else since
        self._former: dict[str, tuple[int, bytes]] = {}  # positions in earlier epochs
        self._is_resumed = False  # a change or a start position was delivered
        self._ready = False
        self._is_over = False
        self._items: queue.SimpleQueue[tuple[Item, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._waiting_bytes = 0
        self._said: str | None = None  # the last reported error
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._main: asyncio.Task[None] | None = None
        self._full = asyncio.Event()
        self._room = asyncio.Event()
        self._link: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def start(self) -> None:
        """Start to connect, again after every failure."""
        self._thread.start()

    def close(self) -> None:
        self._call(self._stop)
        self._thread.join(5.0)

    def take(self, timeout_s: float | None = None) -> Item | None:
        """Return the next item, None after the timeout."""
        try:
            item, size = self._items.get(timeout=timeout_s)
        except queue.Empty:
            return None
        with self._lock:
            self._waiting -= 1
            self._waiting_bytes -= size
            has_room = self._waiting <= MAX_WAITING // 2 and self._waiting_bytes <= MAX_WAITING_BYTES // 2
        if has_room:
            self._call(self._room.set)
        return item

    def _call(self, what: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(what)

    # --- in the thread ---

    def _run(self) -> None:
        with self._runner, contextlib.suppress(asyncio.CancelledError):
            self._runner.run(self._keep_connected())

    def _stop(self) -> None:
        self._is_over = True
        if self._main is not None:
            self._main.cancel()

    async def _keep_connected(self) -> None:
        self._main = asyncio.current_task()
        while not self._is_over:
            self._full.clear()
            self._link = Connection(self._remote, self, self._token, named=self._named)
            self._link.start()
            try:
                await self._full.wait()
            finally:
                await self._link.close()
            if not self._is_over:
                self._room.clear()
                self._put(Lost(RemoteError("changes arrive faster than they are processed; paused")))
                await self._room.wait()

    def _put(self, item: Item, size: int = 0) -> None:
        with self._lock:
            self._waiting += 1
            self._waiting_bytes += size
        self._items.put((item, size))

    def _end(self, error: RemoteError) -> None:
        if not self._is_over:
            self._is_over = True
            self._put(Ended(error))
            self._full.set()

    # --- Session ---

    @property
    def is_current(self) -> bool:
        return self._ready

    async def hello(self) -> Hello:
        """Begin a session on a new connection."""
        lattice_version = version("lattice-tracker")
        return Hello([PROTOCOL_VERSION], __version__, lattice_version, list(CAPABILITIES), follow=False)

    async def receive(self, frames: Iterable[ServerFrame]) -> ReceiveOutcome:
        """Queue changes; at the limit, end the connection and receive the rest on the next."""
        outcome = ReceiveOutcome()
        for frame in frames:
            match frame:
                case Welcome():
                    outcome.to_send.append(self._welcomed(frame))
                case Followed():
                    self._followed(frame)
                case Change():
                    await self._changed(frame)
                case Bye():
                    raise ProtocolError(frame.reason, code=frame.code)
                case _:
                    raise ProtocolError(f"{type(frame).__name__}, which was not requested")
        return outcome

    async def disconnected(self) -> None:
        """Report the lost connection, unless already reported."""
        self._ready = False
        link = self._link
        if link is None or link.error is None or self._is_over:
            return
        if link.is_refused:
            self._end(link.error)
        elif link.error.message != self._said:
            self._said = link.error.message
            self._put(Lost(link.error))

    def _welcomed(self, welcome: Welcome) -> Follow:
        if self._epoch not in ("", welcome.epoch) and self._is_resumed:
            self._begin_epoch(welcome)
        return Follow(self._epoch, self._seq, self._mark)

    def _begin_epoch(self, welcome: Welcome) -> None:
        """Continue with the first change of another epoch; a return to an earlier one proves a restored server."""
        assert self._seq is not None, "it was resumed, so it is somewhere"
        self._former[self._epoch] = (self._seq, self._mark)
        self._epoch = welcome.epoch
        if self._epoch in self._former:
            self._seq, self._mark = self._former[self._epoch]
        else:
            self._seq, self._mark = max(welcome.oldest - 1, 0), b""
            self._put(EpochStarted(welcome.epoch))

    def _followed(self, answer: Followed) -> None:
        if answer.outcome == "following":
            self._epoch, self._seq, self._mark = answer.epoch, answer.seq, answer.mark
            self._is_resumed = self._ready = True
            self._said = None
            self._put(Connected(Position(answer.epoch, answer.seq, answer.mark), answer.head))
        elif self._is_resumed and answer.outcome in ("epoch", "ahead"):
            # The epoch is changing right now: the next Welcome says how.
            raise ConnectionFailed("the server is starting a new epoch")
        else:
            self._end(Gone(_why_not(answer)))

    async def _changed(self, change: Change) -> None:
        if not self._ready or self._seq is None or change.seq != self._seq + 1:
            raise ProtocolError(f"change {change.seq} is out of order after {self._seq}")
        size = sum(len(op.data) for op in change.ops if isinstance(op, PutFile | AppendBytes))
        size += sum(len(op.patch) for op in change.ops if isinstance(op, MergeJson))
        with self._lock:
            is_full = self._waiting >= MAX_WAITING or (self._waiting and self._waiting_bytes + size > MAX_WAITING_BYTES)
        if is_full:
            self._full.set()
            await asyncio.Event().wait()  # until this connection is closed
        self._seq, self._mark = change.seq, change.mark
        self._put(Arrived(self._epoch, change), size)


def _why_not(answer: Followed) -> str:
    if answer.outcome == "ahead":
        return f"there is no change {answer.seq} yet, the last is {answer.head}: resume with --since {answer.head}"
    if answer.outcome == "epoch":
        return f"that change is not in the project's history, which is of epoch {answer.epoch} now: " + (
            f"all that is kept of it comes with --since {max(answer.oldest - 1, 0)}"
        )
    return f"the changes after {answer.seq} are not kept any more; the oldest that is kept is {answer.oldest}: " + (
        f"resume with --since {max(answer.oldest - 1, 0)}"
    )
