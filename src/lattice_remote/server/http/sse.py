"""An answer that goes on for as long as its client listens: a stream of events (``text/event-stream``)."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from http import HTTPStatus
from itertools import accumulate
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lattice_remote.errors import RemoteError, StorageError
from lattice_remote.livepage import KEEP_ALIVE, RETRY_MS
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Bye, Change, Follow, Followed
from lattice_remote.server.http.auth import RequestContext, guest
from lattice_remote.server.http.change_events import EventId, Wanted, block, blocks, events_of
from lattice_remote.server.project.connection import followed
from lattice_remote.server.project.file_reader import PIECE_BYTES, Snapshot
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.send_queue import payload_of
from lattice_remote.server.transport.websocket import PlainHttp
from lattice_remote.text import printable

__all__ = [
    "KEEP_ALIVE_S",
    "EncodedChange",
    "EventStream",
    "Feed",
    "Feeds",
    "Listener",
    "Streamed",
    "chunk",
    "goodbye",
    "routes",
]

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on as it comes
    (b"connection", b"close"),  # what was written past uvicorn's own bookkeeping is the last of its connection
]


class Streamed(Protocol):
    """What is sent to one client, through ``PlainHttp.stream``."""

    async def run(self) -> None:
        """Send it, until it is over."""

    def end(self, bye: Bye) -> None:
        """Let it be over. Never waits."""


class EventStream:
    """The answer, as ASGI has it; it ends with the visitor's token, too.

    ``make`` is called with the connection and whether its body is sent in chunks: where the client speaks HTTP/1.0 the
    body is what comes until the end, as uvicorn has told it.
    """

    def __init__(self, visitor: RequestContext, make: Callable[[PlainHttp, bool], Streamed]) -> None:
        self._visitor, self._make = visitor, make

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": list(_HEADERS)})
        if scope["method"] != "HEAD":
            streamed = self._make(scope["state"]["http"], scope["http_version"] != "1.0")
            with self._visitor.hub.staying(self._visitor.login, streamed.end):
                await streamed.run()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


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


class EncodedChange:
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

    def tell(self, told: EncodedChange) -> None:
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
        self._told: OrderedDict[int, EncodedChange] = OrderedDict()
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
    def fairness_key(self) -> Hashable:
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

    async def told(self, seq: int, frame: bytes) -> EncodedChange:
        """Return change ``seq`` as it is sent; ``frame`` is the change, framed for a WebSocket."""
        if (known := self._told.get(seq)) is not None:
            return known
        async with self._making:  # once, though many have come back together and want it
            return self._told.get(seq) or self._keep(await self._make(seq, frame))

    async def _make(self, seq: int, frame: bytes) -> EncodedChange:
        change = await _beside(len(frame), _decoder.decode, payload_of(frame))
        events = await _beside(len(frame), events_of, change)
        contents = {event.wanted: await self._content(event.wanted) for event in events if event.wanted}
        found = {wanted: data for wanted, data in contents.items() if data is not None}
        size = len(frame) + sum(map(len, found.values()))
        return EncodedChange(seq, await _beside(size, blocks, Position(self.epoch, seq, change.mark), events, found))

    def _keep(self, told: EncodedChange) -> EncodedChange:
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


_MAX_PENDING_BYTES = 4 * 1024 * 1024
_HELD_S = 0.5
"""How long changes that were read for one that catches up are held while it takes nothing; then they are read again."""


class _Stream:
    """The client's side of a feed; ``run()`` it once."""

    def __init__(
        self, http: PlainHttp, visitor: RequestContext, feeds: Feeds, asked: EventId | None, *, is_chunked: bool
    ) -> None:
        """Take what it wants everything after, None for the head."""
        self._http, self._asked = http, asked
        self._is_chunked = is_chunked
        self._project = visitor.project
        self._feeds = feeds
        self._over = asyncio.Event()
        token = visitor.login.token
        name = f"{visitor.project.slug}: events for {token.actor} ({token.id})"
        self._outbox = http.stream(name, self._over.set, max_bytes=_MAX_PENDING_BYTES)
        self._sent = 0  # the last change that was queued for it, all of it or what it had not had before
        self._had = 0  # how many events of the change after that it has had on another connection

    async def run(self) -> None:
        """Tell it everything after where it begins, until it is over."""
        try:
            begin = await followed(self._project, _follow(self._asked))
        except (RemoteError, OSError) as error:
            self.end(goodbye(self._project, error))
            return
        self._feed = self._feeds.join(self._project, self)
        if self._project.failure is not None or self._project.stopping:  # since it was let in
            self.end(Bye("REMOTE_SHUTDOWN", "the project can't be used now; come back in a moment", 1.0))
        self._begin(begin)
        catching_up = asyncio.create_task(self._catch_up())
        try:
            await self._over.wait()
        finally:
            catching_up.cancel()
            self._feeds.leave(self._feed, self)

    def _begin(self, found: Followed) -> None:
        """Say where it begins: where it wants to, or at the head."""
        had = self._asked.events if self._asked is not None else None
        if found.outcome != "following":
            self._reset(found.outcome)
        elif had is not None and found.seq < found.oldest:
            self._reset("expired")  # of this change a part is missing
        else:
            self._sent, self._had = found.seq - (had is not None), had or 0
            here = EventId(Position(found.epoch, found.seq, found.mark), had)
            self._push(f"retry: {RETRY_MS}\nid: {here}\n\n".encode())

    def _reset(self, why: str) -> None:
        """Say that what it asks for is not to be had, and go on from the head."""
        history = self._project.history
        self._sent, self._had = history.head, 0
        here = EventId(history.position)
        data = {"reason": why, "epoch": history.epoch, "seq": history.head}
        self._push(f"retry: {RETRY_MS}\n".encode() + block("reset", here, data))

    async def _catch_up(self) -> None:
        """Send what it missed, at its pace; go live in the tick in which it has what the others have."""
        try:
            while self._sent < self._feed.position:
                await self._tell_batch()
                await self._outbox.room()
        except Exception as error:  # noqa: BLE001 - it comes back, and says where it was
            self.end(goodbye(self._project, error))
        else:
            self._feed.live.add(self)

    async def _tell_batch(self) -> None:
        """Send a batch of what it missed; for one that stalls, no more of it is held than it was sent."""
        batch = await self._project.history.changes_after(self._sent)
        if not batch and self._sent < self._feed.position:
            self._reset("expired")  # while it was catching up
        with contextlib.suppress(TimeoutError):
            for seq, frame in batch:
                self.tell(await self._feed.told(seq, frame))
                async with asyncio.timeout(_HELD_S):
                    await self._outbox.room()

    # --- as a listener ---

    def tell(self, told: EncodedChange) -> None:
        """Queue a change, or what it has not had of it."""
        if told.seq <= self._sent:
            return
        assert told.seq == self._sent + 1, "a live listener was told every change up to the feed's position"
        self._sent = told.seq
        if self._is_chunked and not self._had:
            self._outbox.push(told.chunk)
        else:
            self._push(told.text(self._had))
            self._had = 0

    def keep_alive(self, comment: bytes) -> None:
        """Queue a comment."""
        self._push(comment)

    def end(self, bye: Bye) -> None:
        """Say why in a comment, hand over what is queued, and end the answer. Idempotent, never waits."""
        if not self._over.is_set():
            self._push(f": {printable(bye.code)} {printable(bye.reason)}\n\n".encode())
            self._http.end_stream()
            self._over.set()

    def _push(self, data: bytes) -> None:
        self._outbox.push(chunk(data) if self._is_chunked else data)


async def _events(request: Request) -> EventStream:
    feeds: Feeds = request.app.state.feeds
    visitor, asked = await guest(request), _asked_position(request)
    return EventStream(visitor, lambda http, is_chunked: _Stream(http, visitor, feeds, asked, is_chunked=is_chunked))


def _follow(asked: EventId | None) -> Follow:
    if asked is None:
        return Follow()
    return Follow(asked.position.epoch, asked.position.seq, asked.position.mark)


def _asked_position(request: Request) -> EventId | None:
    """Return where to go on: a browser that comes back says it with a header, at the same address as before.

    What is no position is one that this server does not know: a browser would not ask again after an error.

    Raises:
        ApiError: ``?since=`` is none.
    """
    nowhere = EventId(Position("-", 0, b""))  # of an epoch that never was
    if last := request.headers.getlist("Last-Event-ID"):
        return (EventId.parse(last[0]) if len(last) == 1 else None) or nowhere
    since = request.query_params.getlist("since")
    if not since:
        return None
    position = EventId.parse(since[0]) if len(since) == 1 else None
    if position is None:
        why = "?since= takes the id of an event, or the number of a change, once"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "REMOTE_INVALID", why)
    return position


routes = [Route("/projects/{slug}/events/stream", _events, methods=["GET"])]
