"""Events for an open page: at which change the board is. The page reads what has changed as it always did."""

import asyncio
from collections.abc import Hashable

from starlette.requests import Request

from lattice_remote import livepage
from lattice_remote.protocol.messages import Bye
from lattice_remote.server.network.handoff import PlainHttp
from lattice_remote.server.web.events.feed import chunk
from lattice_remote.server.web.gate import Guest, guest
from lattice_remote.server.web.streaming import EventStream

__all__ = ["stream"]

_KEEP_ALIVE_S = 10.0
"""After so long without a change the last one is told again: a page hears when its connection is dead."""
_SOON_S = 0.02
"""Changes that follow each other within this are told as one."""
_MAX_PENDING_BYTES = 64 * 1024


class _Listener:
    """An open page, as a follower of its project; it is over when ``over`` is set."""

    def __init__(self, http: PlainHttp, visitor: Guest, *, is_chunked: bool) -> None:
        token = visitor.login.token
        self.lane: Hashable = self
        self.over = asyncio.Event()
        self._http, self._is_chunked = http, is_chunked
        self._project, self._history = visitor.project, visitor.project.history
        name = f"{visitor.project.slug}: dashboard of {token.actor} ({token.id})"
        self._outbox = http.stream(name, self.over.set, max_bytes=_MAX_PENDING_BYTES)
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Tell where the board is, and of every change, until this is over."""
        self._history.join(self)
        self._tell()
        if self._project.failure is not None or self._project.stopping:  # since it was let in
            self.end(Bye("REMOTE_SHUTDOWN", "the project can't be used now; come back in a moment", 1.0))
        try:
            await self.over.wait()
        finally:
            self._history.leave(self)
            self._cancel()

    def _tell(self) -> None:
        self._is_due = False
        data = livepage.event(str(self._history.position))
        self._outbox.push(chunk(data) if self._is_chunked else data)
        self._tell_in(_KEEP_ALIVE_S)

    def _tell_in(self, delay_s: float) -> None:
        self._cancel()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._tell)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # --- as a follower ---

    def change_committed(self, seq: int, frame: bytes) -> None:  # noqa: ARG002 - the head says it all
        """Tell it, with what else comes at once."""
        if not self._is_due and not self.over.is_set():
            self._is_due = True
            self._tell_in(_SOON_S)

    def answer(self, request_id: str, reply: bytes) -> None:
        """It asks for nothing."""

    def end(self, bye: Bye) -> None:  # noqa: ARG002 - the page finds out when it comes back
        """End the answer. Idempotent, never waits."""
        if not self.over.is_set():
            self._http.end_stream()
            self.over.set()


async def stream(request: Request) -> EventStream:
    """Tell of every change until the page leaves, its token ends or the server stops."""
    visitor = await guest(request)
    return EventStream(visitor, lambda http, is_chunked: _Listener(http, visitor, is_chunked=is_chunked))
