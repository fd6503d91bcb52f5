"""The changes of a project as they arrive, for somebody who takes them in his own time.

A thread of its own talks to the server: whoever takes changes may block for as long as he likes. What has come and
was not taken is bounded; where that is reached the connection is closed, and a new one goes on at the same number
once half of it was taken. So no slow reader holds a server's connection half full (I10), and none misses or sees
twice a change.
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
from lattice_remote.errors import ConnectionFailed, ProtocolError, Rejected, RemoteError
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
"""Of changes that have come and were not taken."""


class Gone(RemoteError):
    """The changes that were asked for are not kept any more, or never were there. ``oldest`` is the first that is."""

    code = "REMOTE_GONE"


@dataclass(frozen=True)
class Arrived:
    """One change."""

    epoch: str
    change: Change


@dataclass(frozen=True)
class Connected:
    """The changes after ``position`` follow; ``head`` is the last that there is."""

    position: Position
    head: int


@dataclass(frozen=True)
class EpochStarted:
    """The project's history has begun anew (I7): the changes from its first, in the new numbers, follow."""

    epoch: str


@dataclass(frozen=True)
class Lost:
    """There is no connection, and why; it is tried again."""

    error: RemoteError


@dataclass(frozen=True)
class Ended:
    """Nothing more will come, and why."""

    error: RemoteError


Item = Arrived | Connected | EpochStarted | Lost | Ended


class ChangeStream:
    """``start()`` it, ``take()`` until ``Ended``, ``close()`` it from the same thread.

    Args:
        remote, token, named: as of a ``Link``.
        since: the last change that is known already, or only its number, in whichever epoch; None for the head.
    """

    def __init__(
        self, remote: Remote, token: str | None, *, named: Server | None, since: Position | int | None = None
    ) -> None:
        self._remote, self._token, self._named = remote, token, named
        begin = since if isinstance(since, Position) else None
        self._epoch, self._mark = (begin.epoch, begin.mark) if begin else ("", b"")
        self._seq = since.seq if isinstance(since, Position) else since
        self._former: dict[str, tuple[int, bytes]] = {}  # where it was in the epochs before
        self._is_resumed = False  # a change, or the place to begin at, was told
        self._ready = False
        self._is_over = False
        self._items: queue.SimpleQueue[tuple[Item, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._waiting_bytes = 0
        self._said: str | None = None  # the trouble that was told last
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._main: asyncio.Task[None] | None = None
        self._full = asyncio.Event()
        self._room = asyncio.Event()
        self._link: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def start(self) -> None:
        """Begin to connect, and keep at it."""
        self._thread.start()

    def close(self) -> None:
        """End the connection."""
        self._call(self._stop)
        self._thread.join(5.0)

    def take(self, timeout_s: float | None = None) -> Item | None:
        """Return what comes next, None when nothing has come in time."""
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
        with contextlib.suppress(RuntimeError):  # it has ended
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
                self._put(Lost(RemoteError("the changes come faster than they are taken; going on when some are")))
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

    # --- Conversation ---

    @property
    def is_current(self) -> bool:
        """Whether changes come."""
        return self._ready

    async def hello(self) -> Hello:
        """Begin on a new connection."""
        lattice_version = version("lattice-tracker")
        return Hello([PROTOCOL_VERSION], __version__, lattice_version, list(CAPABILITIES), follow=False)

    async def receive(self, frames: Iterable[ServerFrame]) -> ReceiveOutcome:
        """Take frames; one that is too much waits for the end of this connection, and comes again on the next."""
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
                    raise ProtocolError(f"{type(frame).__name__}, which was not asked for")
        return outcome

    async def disconnected(self) -> None:
        """The connection is gone: say why, unless that was said already."""
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
        if "follow" not in welcome.capabilities:
            server = f"the server (lattice-remote {welcome.server_version})"
            raise Rejected(
                f"{server} can't tell of changes to those who keep no copy: upgrade it", code="REMOTE_VERSION"
            )
        if self._epoch not in ("", welcome.epoch) and self._is_resumed:
            self._begin_epoch(welcome)
        return Follow(self._epoch, self._seq, self._mark)

    def _begin_epoch(self, welcome: Welcome) -> None:
        """Go on from the first change of another epoch; one that was left before proves that the server went back."""
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
            # Of a history that begins anew at this moment: the next Welcome says how.
            raise ConnectionFailed("the project's history begins anew on the server")
        else:
            self._end(Gone(_why_not(answer)))

    async def _changed(self, change: Change) -> None:
        if not self._ready or self._seq is None or change.seq != self._seq + 1:
            raise ProtocolError(f"change {change.seq} is out of turn after {self._seq}")
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
        return f"there is no change {answer.seq} yet, the last is {answer.head}: go on with --since {answer.head}"
    if answer.outcome == "epoch":
        return f"that change is not in the project's history, which is of epoch {answer.epoch} now: " + (
            f"all that is kept of it comes with --since {max(answer.oldest - 1, 0)}"
        )
    return f"the changes after {answer.seq} are not kept any more; the oldest that is kept is {answer.oldest}: " + (
        f"go on with --since {max(answer.oldest - 1, 0)}"
    )
