"""Server-sent events: the change stream of a project, shared by its subscribers, and streams in general."""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from itertools import accumulate

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lattice_remote.errors import RemoteError, StorageError, printable
from lattice_remote.livepage import RETRY_MS
from lattice_remote.protocol.messages import Bye, Change, Position
from lattice_remote.server.http.auth import RequestContext, request_context
from lattice_remote.server.http.change_events import EventId, Wanted, block, blocks, events_of, position_block
from lattice_remote.server.project.file_reader import PIECE_BYTES, read_content
from lattice_remote.server.project.history import Start
from lattice_remote.server.project.project import Project
from lattice_remote.server.transport.api_error import ApiError
from lattice_remote.server.transport.websocket import PlainHttp, payload_of

__all__ = ["KEEP_ALIVE_S", "Feeds", "page_events", "routes"]

_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
    (b"connection", b"close"),  # data written past uvicorn's bookkeeping must be the last of its connection
]


KEEP_ALIVE_S = 10.0
_KEPT = 256
_KEPT_BYTES = 4 * 1024 * 1024
"""For reconnecting clients."""
_IN_THREAD_BYTES = 64 * 1024
"""A larger change is encoded in a thread."""
_SETTLE_S, _LOOK_S = 1.0, 0.02

_decoder = msgspec.msgpack.Decoder(Change)
_log = logging.getLogger(__name__)


def chunk(data: bytes) -> bytes:
    """Return one chunk of an HTTP/1.1 body (RFC 9112 section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def goodbye(project: Project, error: Exception) -> Bye:
    match error:
        case RemoteError():
            return Bye(error.code, error.message[:4096], 1.0)
        case OSError():
            return Bye("REMOTE_STORAGE", f"the server cannot read its journal: {error.strerror}", 1.0)
        case _:
            _log.error("%s: cannot send the events of a change", project.slug, exc_info=error)
            return Bye("REMOTE_FAILED", "the server failed; see its log", 1.0)


class EncodedChange:
    def __init__(self, seq: int, events: list[bytes]) -> None:
        self.seq = seq
        self.chunk = chunk(b"".join(events))
        self.last = events[-1]
        self._ends = list(accumulate(map(len, events)))

    def text(self, had: int = 0) -> bytes:
        begin = self.chunk.index(b"\r\n") + 2
        skipped = self._ends[min(had, len(self._ends)) - 1] if had else 0
        return self.chunk[begin + skipped : -2]


class Feeds:
    def __init__(self) -> None:
        self._feeds: dict[Project, Feed] = {}

    def join(self, project: Project, listener: "EventStream") -> "Feed":
        feed = self._feeds.get(project)
        if feed is None or feed.is_over:
            feed = self._feeds[project] = Feed(project)
        feed.listeners.add(listener)
        return feed

    def leave(self, feed: "Feed", listener: "EventStream") -> None:
        feed.listeners.discard(listener)
        feed.live.discard(listener)
        if not feed.listeners:
            feed.close()
            if self._feeds.get(feed.project) is feed:
                del self._feeds[feed.project]


class Feed:
    """Change feed of one project and epoch: encodes each change once."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.epoch = project.history.epoch
        self.position = project.history.head
        """Sent to live subscribers."""
        self.listeners: set[EventStream] = set()
        """Those that catch up too."""
        self.is_over = False
        """Later subscribers get another."""
        self.live: set[EventStream] = set()
        """Have every change up to ``position``."""
        self._encoded: OrderedDict[int, EncodedChange] = OrderedDict()
        self._encoded_bytes = 0
        self._making = asyncio.Lock()
        self._news = asyncio.Event()
        project.history.join(self)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"events of {project.slug}")

    def close(self) -> None:
        self.project.history.leave(self)
        self._task.cancel()

    # --- subscriber of the history ---

    def change_committed(self, seq: int, frame: bytes) -> None:  # noqa: ARG002 - it reads them in its own time
        self._news.set()

    def end(self, bye: Bye) -> None:
        self.is_over = True
        for listener in tuple(self.listeners):
            listener.end(bye)

    async def encoded(self, seq: int, frame: bytes) -> EncodedChange:
        if (known := self._encoded.get(seq)) is not None:
            return known
        async with self._making:  # once, although many subscribers reconnect together
            return self._encoded.get(seq) or self._keep(await self._make(seq, frame))

    async def _make(self, seq: int, frame: bytes) -> EncodedChange:
        change = await _beside(len(frame), _decoder.decode, payload_of(frame))
        events = await _beside(len(frame), events_of, change)
        contents = {event.wanted: await self._content(event.wanted) for event in events if event.wanted}
        found = {wanted: data for wanted, data in contents.items() if data is not None}
        size = len(frame) + sum(map(len, found.values()))
        return EncodedChange(seq, await _beside(size, blocks, Position(self.epoch, seq, change.mark), events, found))

    def _keep(self, change: EncodedChange) -> EncodedChange:
        self._encoded[change.seq] = change
        self._encoded_bytes += len(change.chunk)
        while len(self._encoded) > _KEPT or (self._encoded_bytes > _KEPT_BYTES and len(self._encoded) > 1):
            self._encoded_bytes -= len(self._encoded.popitem(last=False)[1].chunk)
        return change

    async def _content(self, wanted: Wanted) -> bytes | None:
        """Return a file as the change wrote it; None if a later change replaced it.

        Running commands put the disk ahead of the head: a mismatch is read again for a moment.
        """
        files, end = self.project.history.files, asyncio.get_running_loop().time() + _SETTLE_S
        while (known := files.get(wanted.path)) is not None and known[1] == wanted.digest and known[0] <= PIECE_BYTES:
            try:
                data = await asyncio.to_thread(read_content, self.project.paths.lattice / wanted.path, known)
            except OSError as error:
                _log.warning("%s: cannot read %s: %s", self.project.slug, wanted.path, error.strerror)
                return None
            if data is not None or asyncio.get_running_loop().time() >= end:
                return data
            await asyncio.sleep(_LOOK_S)
            files = self.project.history.files
        return None

    async def _run(self) -> None:
        try:
            with self.project.reader.kept():
                while True:
                    await self._send_news()
                    await self._wait_for_news()
        except Exception as error:  # noqa: BLE001 - its listeners come back, and say where they were
            self.end(goodbye(self.project, error))

    async def _send_news(self) -> None:
        history = self.project.history
        while self.position < history.head:
            batch = await history.changes_after(self.position)
            if not batch:
                raise StorageError(f"change {self.position + 1} is no longer kept")
            for seq, frame in batch:
                change = await self.encoded(seq, frame)
                assert seq == self.position + 1, "numbers have no gap (I1)"
                self.position = seq
                for listener in tuple(self.live):
                    listener.send_change(change)

    async def _wait_for_news(self) -> None:
        self._news.clear()
        if self.position < self.project.history.head:
            return
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await self._news.wait()
        except TimeoutError:
            event = position_block(EventId(self.project.history.position))
            for listener in tuple(self.live) if self.position == self.project.history.head else ():
                listener.push(event)


async def _beside[*A, R](size: int, function: Callable[[*A], R], *arguments: *A) -> R:
    """Call a function, in a thread for a large input."""
    return function(*arguments) if size <= _IN_THREAD_BYTES else await asyncio.to_thread(function, *arguments)


_MAX_PENDING_BYTES = 4 * 1024 * 1024
_HELD_S = 0.5
"""For a stalled subscriber; then they are read again."""


class EventStream:
    """ASGI response with the changes after ``since`` (None: the head), until the context's token ends."""

    def __init__(self, context: RequestContext, feeds: Feeds, since: EventId | None, *, is_brief: bool) -> None:
        self._context, self._project = context, context.project
        self._feeds, self._since, self._is_brief = feeds, since, is_brief
        self._over = asyncio.Event()
        self._sent = 0  # the last change queued, whole or in part
        self._had = 0  # number of events of the next change that the client received on another connection

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": list(_HEADERS)})
        if scope["method"] != "HEAD":
            self._http: PlainHttp = scope["state"]["http"]
            self._is_chunked = scope["http_version"] != "1.0"  # an HTTP/1.0 body ends with the connection
            token = self._context.login.token
            name = f"{self._project.slug}: events for {token.actor} ({token.id})"
            self._outbox = self._http.stream(name, self._over.set, max_bytes=_MAX_PENDING_BYTES)
            with self._context.registry.auth.staying(self._context.login, self.end):
                await self._run()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _run(self) -> None:
        try:
            begin = await self._find_start()
        except (RemoteError, OSError) as error:
            self.end(goodbye(self._project, error))
            return
        self._feed = self._feeds.join(self._project, self)
        if self._project.failure is not None or self._project.stopping:  # since admission
            self.end(Bye("REMOTE_SHUTDOWN", "the project is not usable now; retry in a moment", 1.0))
        self._begin(begin)
        catching_up = asyncio.create_task(self._catch_up())
        try:
            await self._over.wait()
        finally:
            catching_up.cancel()
            self._feeds.leave(self._feed, self)

    async def _find_start(self) -> Start:
        if self._since is None:
            return await self._project.find_start()
        position = self._since.position
        return await self._project.find_start(position.epoch, position.seq, position.mark)

    def _begin(self, start: Start) -> None:
        had, seq = self._since.events if self._since is not None else None, start.position.seq
        if start.outcome != "kept":
            self._reset(start.outcome)
        elif had is not None and seq < self._project.history.oldest:
            self._reset("expired")  # the rest of this change is no longer kept
        else:
            self._sent, self._had = seq - (had is not None), had or 0
            here = EventId(start.position, had)
            self.push(f"retry: {RETRY_MS}\n".encode() + position_block(here))

    def _reset(self, why: str) -> None:
        history = self._project.history
        self._sent, self._had = history.head, 0
        here = EventId(history.position)
        data = {"reason": why, "epoch": history.epoch, "seq": history.head}
        self.push(f"retry: {RETRY_MS}\n".encode() + block("reset", here, data))

    async def _catch_up(self) -> None:
        """Send missed changes at the client's pace; go live in the tick of the last."""
        try:
            while self._sent < self._feed.position:
                await self._send_batch()
                await self._outbox.room()
        except Exception as error:  # noqa: BLE001 - it comes back, and says where it was
            self.end(goodbye(self._project, error))
        else:
            self._feed.live.add(self)

    async def _send_batch(self) -> None:
        batch = await self._project.history.changes_after(self._sent)
        if not batch and self._sent < self._feed.position:
            self._reset("expired")  # expired during the catch-up
        with contextlib.suppress(TimeoutError):
            for seq, frame in batch:
                self.send_change(await self._feed.encoded(seq, frame))
                async with asyncio.timeout(_HELD_S):
                    await self._outbox.room()

    def send_change(self, change: EncodedChange) -> None:
        """Queue a change, or the part that the client lacks."""
        if change.seq <= self._sent:
            return
        assert change.seq == self._sent + 1, "a live listener has every change up to the feed's position"
        self._sent = change.seq
        if self._is_brief:
            self.push(change.last)
        elif self._is_chunked and not self._had:
            self._outbox.push(change.chunk)
        else:
            self.push(change.text(self._had))
            self._had = 0

    def end(self, bye: Bye) -> None:
        """Queue the reason as a comment, then end; idempotent."""
        if not self._over.is_set():
            self.push(f": {printable(bye.code)} {printable(bye.reason)}\n\n".encode())
            self._http.end_stream()
            self._over.set()

    def push(self, data: bytes) -> None:
        self._outbox.push(chunk(data) if self._is_chunked else data)


async def _events(request: Request) -> EventStream:
    context = await request_context(request)
    return EventStream(context, request.app.state.feeds, _requested_position(request), is_brief=False)


async def page_events(request: Request) -> EventStream:
    """Return a stream from the head: a page reads the board again after each change."""
    return EventStream(await request_context(request), request.app.state.feeds, None, is_brief=True)


def _requested_position(request: Request) -> EventId | None:
    """Return where to continue: a reconnecting browser's header, else the query.

    A malformed header counts as an unknown position: no browser reconnects after an error. Raises ApiError for a
    malformed query.
    """
    nowhere = EventId(Position("-", 0, b""))  # an epoch that never exists
    if last := request.headers.getlist("Last-Event-ID"):
        return (EventId.parse(last[0]) if len(last) == 1 else None) or nowhere
    since = request.query_params.getlist("since")
    if not since:
        return None
    position = EventId.parse(since[0]) if len(since) == 1 else None
    if position is None:
        why = "?since= must be an event id or a change's number, once"
        raise ApiError(HTTPStatus.UNPROCESSABLE_ENTITY, "REMOTE_INVALID", why)
    return position


routes = [Route("/projects/{slug}/events/stream", _events, methods=["GET"])]
