"""All that listen to one project over HTTP: each change is made into events once, and sent to all in the same moment.

Nothing is queued here: what is to be told is read from the project's history at this feed's pace, so that a project
which changes faster than its events can be made costs no memory. What a client has not taken yet is with its outbox.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import accumulate
from typing import Protocol

import msgspec

from lattice_remote.errors import RemoteError, StorageError
from lattice_remote.livepage import KEEP_ALIVE
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Bye, Change
from lattice_remote.server.network.outbox import payload_of
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.snapshot import PIECE_BYTES, Snapshot
from lattice_remote.server.web.events.telling import Wanted, blocks, events_of

__all__ = ["KEEP_ALIVE_S", "Feed", "Feeds", "Listener", "Told", "chunk", "goodbye"]

KEEP_ALIVE_S = 10.0
"""After so long without a change a comment is sent."""
_KEPT = 256
_KEPT_BYTES = 4 * 1024 * 1024
"""So much of what was told last is kept, for those who come back together."""
_IN_THREAD_BYTES = 64 * 1024
"""Of a change that is larger the events are made beside the loop."""
_SETTLE_S, _LOOK_S = 1.0, 0.02

_decoder = msgspec.msgpack.Decoder(Change)
_log = logging.getLogger(__name__)


def chunk(data: bytes) -> bytes:
    """Return one chunk of an HTTP/1.1 body (RFC 9112 section 7.1); of no data there is none."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def goodbye(project: Project, error: Exception) -> Bye:
    """Return what is said to those whom an error ends; log one that nobody expects."""
    match error:
        case RemoteError():
            return Bye(error.code, error.message[:4096], 1.0)
        case OSError():
            return Bye("REMOTE_STORAGE", f"the server can't read its journal: {error.strerror}", 1.0)
        case _:
            _log.error("%s: telling the events of a change failed", project.slug, exc_info=error)
            return Bye("REMOTE_FAILED", "the server failed at this; see its log", 1.0)


class Told:
    """A change as it is sent: its events, as one chunk that all share."""

    def __init__(self, seq: int, events: list[bytes]) -> None:
        self.seq = seq
        self.chunk = chunk(b"".join(events))
        self._ends = list(accumulate(map(len, events)))

    def text(self, had: int = 0) -> bytes:
        """Return the events behind the first ``had``, as they are without chunks."""
        begin = self.chunk.index(b"\r\n") + 2
        skipped = self._ends[min(had, len(self._ends)) - 1] if had else 0
        return self.chunk[begin + skipped : -2]


class Listener(Protocol):
    """One client. No call waits or raises."""

    def tell(self, told: Told) -> None:
        """Send a change, unless it was sent before."""

    def keep_alive(self, comment: bytes) -> None:
        """Send something that says nothing."""

    def end(self, bye: Bye) -> None:
        """Say goodbye and close."""


class Feeds:
    """The feeds of a server, one for each project that somebody listens to."""

    def __init__(self) -> None:
        self._feeds: dict[Project, Feed] = {}

    def join(self, project: Project, listener: Listener) -> "Feed":
        """Return the project's feed, in which the listener is known from now on; ``leave()`` it."""
        feed = self._feeds.get(project)
        if feed is None or feed.is_over:
            feed = self._feeds[project] = Feed(project)
        feed.listeners.add(listener)
        return feed

    def leave(self, feed: "Feed", listener: Listener) -> None:
        """Forget a listener; with the last one its feed ends."""
        feed.listeners.discard(listener)
        feed.live.discard(listener)
        if not feed.listeners:
            feed.close()
            if self._feeds.get(feed.project) is feed:
                del self._feeds[feed.project]


class Feed:
    """See the module's text. A follower of its project's history; all its listeners are of one epoch."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.epoch = project.history.epoch
        self.position = project.history.head
        """The last change that the live listeners were told of."""
        self.listeners: set[Listener] = set()
        """All, also those that catch up."""
        self.is_over = False
        """Whether all were sent away; who comes then is of another feed."""
        self.live: set[Listener] = set()
        """Those that have everything up to ``position``."""
        self._told: OrderedDict[int, Told] = OrderedDict()
        self._told_bytes = 0
        self._making = asyncio.Lock()
        self._news = asyncio.Event()
        project.history.join(self)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"events of {project.slug}")

    def close(self) -> None:
        """Follow no longer. Idempotent."""
        self.project.history.leave(self)
        self._task.cancel()

    # --- as a follower ---

    @property
    def lane(self) -> Hashable:
        """It asks for nothing."""
        return self

    def change_committed(self, seq: int, frame: bytes) -> None:  # noqa: ARG002 - it reads them in its own time
        """There is something to tell."""
        self._news.set()

    def answer(self, request_id: str, reply: bytes) -> None:
        """It asks for nothing."""

    def end(self, bye: Bye) -> None:
        """Send all listeners away: another history begins, or the project is closed."""
        self.is_over = True
        for listener in tuple(self.listeners):
            listener.end(bye)

    # --- what is told ---

    async def told(self, seq: int, frame: bytes) -> Told:
        """Return change ``seq`` as it is sent; ``frame`` is the change, framed for a WebSocket."""
        if (known := self._told.get(seq)) is not None:
            return known
        async with self._making:  # once, though many have come back together and want it
            return self._told.get(seq) or self._keep(await self._make(seq, frame))

    async def _make(self, seq: int, frame: bytes) -> Told:
        change = await _beside(len(frame), _decoder.decode, payload_of(frame))
        events = await _beside(len(frame), events_of, change)
        contents = {event.wanted: await self._content(event.wanted) for event in events if event.wanted}
        found = {wanted: data for wanted, data in contents.items() if data is not None}
        size = len(frame) + sum(map(len, found.values()))
        return Told(seq, await _beside(size, blocks, Position(self.epoch, seq, change.mark), events, found))

    def _keep(self, told: Told) -> Told:
        """Keep it for a while, and return it."""
        self._told[told.seq] = told
        self._told_bytes += len(told.chunk)
        while len(self._told) > _KEPT or (self._told_bytes > _KEPT_BYTES and len(self._told) > 1):
            self._told_bytes -= len(self._told.popitem(last=False)[1].chunk)
        return told

    async def _content(self, wanted: Wanted) -> bytes | None:
        """Return a file of the tree as the change made it; None when a later change has made it another.

        The disk is ahead of the head by the commands that run, of which one may be undone: so it is looked at again
        for a moment, while the head says that the file is still this one.
        """
        files, end = self.project.history.files, asyncio.get_running_loop().time() + _SETTLE_S
        while (known := files.get(wanted.path)) is not None and known[1] == wanted.digest and known[0] <= PIECE_BYTES:
            data = await asyncio.to_thread(_read, self.project, wanted)
            if data is not None or asyncio.get_running_loop().time() >= end:
                return data
            await asyncio.sleep(_LOOK_S)
            files = self.project.history.files
        return None

    async def _run(self) -> None:
        try:
            while True:
                await self._tell_news()
                await self._wait_for_news()
        except Exception as error:  # noqa: BLE001 - its listeners come back, and say where they were
            self.end(goodbye(self.project, error))

    async def _tell_news(self) -> None:
        history = self.project.history
        while self.position < history.head:
            batch = await history.changes_after(self.position)
            if not batch:
                raise StorageError(f"change {self.position + 1} is not kept any more")
            for seq, frame in batch:
                told = await self.told(seq, frame)
                assert seq == self.position + 1, "numbers have no gap (I1)"
                self.position = seq
                for listener in tuple(self.live):
                    listener.tell(told)

    async def _wait_for_news(self) -> None:
        self._news.clear()
        if self.position < self.project.history.head:
            return
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await self._news.wait()
        except TimeoutError:
            for listener in tuple(self.live):
                listener.keep_alive(KEEP_ALIVE)


async def _beside[*A, R](size: int, function: Callable[[*A], R], *arguments: *A) -> R:
    """Call a function, in a thread if what it is to work on is so large that others would notice."""
    return function(*arguments) if size <= _IN_THREAD_BYTES else await asyncio.to_thread(function, *arguments)


def _read(project: Project, wanted: Wanted) -> bytes | None:
    """Return the content of a file if it has this digest. Blocking."""
    try:
        snapshot = Snapshot.open(project.paths.lattice / wanted.path, 0)
        if snapshot is None:
            return None
        try:
            return snapshot.piece(0, snapshot.size) if snapshot.digest == wanted.digest else None
        finally:
            snapshot.close()
    except OSError as error:
        _log.warning("%s: cannot read %s: %s", project.slug, wanted.path, error.strerror)
        return None
