"""One client that listens to a project: where it begins, what it missed, then every change until it leaves or is cut.

    catching up --it was sent all that the feed has told--> live --goodbye, cut, or gone--> over

Its bytes go past uvicorn into an outbox (``PlainHttp.stream``), as those of a WebSocket client do: nobody waits for it,
and it is cut when it takes nothing for 10 s, or has more than ``_MAX_PENDING_BYTES`` to take.
"""

import asyncio
import contextlib
from http import HTTPStatus

from starlette.requests import Request
from starlette.routing import Route

from lattice_remote.errors import RemoteError
from lattice_remote.livepage import RETRY_MS
from lattice_remote.logtext import printable
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Bye, Follow, Followed
from lattice_remote.server.network.handoff import PlainHttp
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.project.continuing import followed
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.events.feed import Feeds, Told, chunk, goodbye
from lattice_remote.server.web.events.telling import EventId, block
from lattice_remote.server.web.gate import Guest, guest
from lattice_remote.server.web.streaming import EventStream

__all__ = ["routes"]

_MAX_PENDING_BYTES = 4 * 1024 * 1024
_HELD_S = 0.5
"""How long changes that were read for one that catches up are held while it takes nothing; then they are read again."""


class _Stream:
    """The client's side of a feed; ``run()`` it once."""

    def __init__(
        self, http: PlainHttp, visitor: Guest, feeds: Feeds, asked: EventId | None, *, is_chunked: bool
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

    def tell(self, told: Told) -> None:
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
        TurnedAway: ``?since=`` is none.
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
        raise TurnedAway(Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, "REMOTE_INVALID", why))
    return position


routes = [Route("/projects/{slug}/events/stream", _events, methods=["GET"])]
