"""Sends edited plans and notes of one cache, one after the other, and settles what the server makes of them (I4)."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from lattice_remote.client.cache.busy import is_being_written
from lattice_remote.client.cache.follower import Follower
from lattice_remote.client.cache.known import Signature
from lattice_remote.client.cache.unanswered import Sent
from lattice_remote.client.link.link import Link
from lattice_remote.errors import ConnectionFailed, Rejected
from lattice_remote.protocol.messages import Put, Refused, Stored
from lattice_remote.protocol.operations import digest_of

__all__ = ["Pushed", "Pusher"]

_LONG_BASE_BYTES = 16 * 1024
_SEND_WHOLE = ("REMOTE_STALE_BASE", "REMOTE_VERSION")
SAVING_S = 2.0
"""So long a file that is being written, or was emptied just now, is waited for: an editor is about to save it."""
_POLL_S = 0.02


@dataclass(slots=True)
class Pushed:
    """What came of sending edits: each with its path and outcome, and what the user should know."""

    sent: list[dict[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether the server did not take one of them."""
        return any(sent["outcome"] == "refused" for sent in self.sent)


class Pusher:
    """The edits of one cache on their way.

    Args:
        follower: the cache's.
        following: the link that the follower follows on.
        reached: waits until the files hold every change up to a number; tells whether they do.
    """

    def __init__(self, follower: Follower, following: Link, reached: Callable[[int], Awaitable[bool]]) -> None:
        self._follower = follower
        self._following = following
        self._reached = reached
        self._turn = asyncio.Lock()
        self._unanswered = follower.edits.unanswered
        self._refused: dict[str, tuple[Signature | None, str, object]] = {}  # path -> as it was then, why, by whom

    def refused(self) -> dict[str, str]:
        """Return the edits that the server does not take as they are: path to the reason."""
        return {path: why for path, (found, why, _) in self._refused.items() if self._signature(path) == found}

    async def push(self, link: Link, paths: Iterable[str] | None = None, *, again: bool = False) -> Pushed:
        """Send the edits of these files, None for all that are edited.

        One that the server has refused is sent again when it, or the server, has changed, or with ``again``.

        Raises:
            RemoteError: the server is out of reach, or takes nothing from this token; what was not sent is kept.
        """
        pushed = Pushed()
        async with self._turn:
            for path in self._follower.edits.scan() if paths is None else paths:
                if not again and self._is_hopeless(path):
                    continue
                await self._until_saved(path)
                if self._follower.edits.is_edited(path):
                    await self._push_one(link, path, pushed)
        return pushed

    async def _push_one(self, link: Link, path: str, pushed: Pushed) -> None:
        outcome, notice = await self._send(link, path)
        pushed.sent.append({"path": path, "outcome": outcome})
        if notice:
            pushed.notices.append(notice)

    async def _send(self, link: Link, path: str) -> tuple[str, str | None]:
        if (before := self._unanswered.get(path)) is not None:
            await self._settle_unanswered(link, before)
            if not self._follower.edits.is_edited(path):
                return "unchanged", None
        found, base = self._signature(path), self._follower.edits.base(path)
        text = self._follower.cache.read(path)
        put = Put(id=_new_id(), path=path, base=self._follower.edits.older.base_of(path, text, base), text=text)
        answer = await self._ask_briefly(link, put, base, is_edit=True)
        if isinstance(answer, Refused):
            self._unanswered.forget(path)
            return self._note_refusal(path, found, answer.message)
        self._refused.pop(path, None)
        copy = await self._settle(link, put, answer, base)
        if copy is not None:
            return "conflict", None  # said by every command until it is resolved
        if put.base != base:
            return answer.outcome, (
                f"{path} was saved without what others had written meanwhile; that was put back, and what you wrote is "
                "in it: load it anew in your editor (to remove lines of others, remove them once more)"
            )
        return answer.outcome, None

    async def _settle(self, link: Link, put: Put, answer: Stored, base: bytes | None) -> str | None:
        """Go on from the server's answer to an edit; return where the text was put for a conflict."""
        if link is not self._following:
            # Its own change must find the file still edited: an older one, which it was merged with, may come first.
            await self._reached(answer.seq)
        effects, copy = await self._follower.settle(put, answer.outcome, base)
        self._unanswered.forget(put.path)
        await self._following.carry_out(effects)
        return copy

    async def _settle_unanswered(self, link: Link, sent: Sent) -> None:
        """Ask what became of an edit whose answer was lost: what was saved since builds on it, if it was stored."""
        answer = await self._ask(link, sent.frame, sent.first_sent_at())
        if isinstance(answer, Stored):
            await self._settle(link, sent.put, answer, sent.base)
        else:
            self._unanswered.forget(sent.put.path)

    async def put(self, link: Link, path: str, text: bytes) -> str:
        """Send a text for a plan or notes, made from the server's as it is here; return the outcome.

        The file is the server's again when this returns, unless it is edited.

        Raises:
            RemoteError: it was not sent, or not taken.
        """
        async with self._turn:
            await self.until_in_place(path)
            base = self._follower.edits.base(path)
            put = Put(id=_new_id(), path=path, base=base, text=text)
            answer = await self._ask_briefly(link, put, base)
            if isinstance(answer, Refused):
                raise Rejected(f"{path} was not sent: {answer.message}", code=answer.code)
            await self._reached(answer.seq)
        return answer.outcome

    async def until_in_place(self, path: str) -> None:
        """Wait for a moment until a plan or notes holds the server's text, or an edit of it.

        Raises:
            Rejected: it does not: after a conflict the file, and its base, may still be what was set aside.
        """
        if not await self._following.changed.until(lambda: path not in self._follower.replica.wanted, SAVING_S):
            raise Rejected(
                f"the server's text of {path} is not here yet; nothing was changed: if the file is open in an editor, "
                "close it, then repeat it",
                code="REMOTE_BUSY",
            )

    async def _ask_briefly(
        self, link: Link, put: Put, current: bytes | None, *, is_edit: bool = False
    ) -> Stored | Refused:
        """Ask, with the digest of a long base in its place where the server most likely has that text itself.

        Of an edit it is kept in mind what was sent, until the answer is settled.
        """
        frame = self._brief(link, put, current)
        while True:
            if is_edit:
                self._unanswered.remember(Sent(put, frame, current, time.time()))
            answer = await self._ask(link, frame)
            if frame is put or not isinstance(answer, Refused) or answer.code not in _SEND_WHOLE:
                return answer
            frame = put

    def _brief(self, link: Link, put: Put, current: bytes | None) -> Put:
        welcome = link.welcome
        can = welcome is not None and "put-base" in welcome.capabilities
        if not can or put.base is None or put.base != current or len(put.base) < _LONG_BASE_BYTES:
            return put
        return msgspec.structs.replace(put, id=_new_id(), base=None, base_digest=digest_of(put.base))

    async def _ask(self, link: Link, put: Put, first_sent_at: float | None = None) -> Stored | Refused:
        answer = await link.ask(put, first_sent_at=first_sent_at)
        if not isinstance(answer, Stored | Refused):
            raise ConnectionFailed("the server answered something else", sent=True)
        return answer

    # --- files that can't be sent yet, or as they are ---

    async def _until_saved(self, path: str) -> None:
        """Wait for the end of a save that is going on, for a moment."""
        deadline = time.monotonic() + SAVING_S
        while time.monotonic() < deadline and self.is_being_saved(path):  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(_POLL_S)

    def is_being_saved(self, path: str) -> bool:
        """Whether a file is about to become something else: open for writing, or emptied a moment ago."""
        found = self._signature(path)
        if found is None:
            return False
        mtime_ns, size = found[0], found[1]
        if not size and 0 <= time.time_ns() - mtime_ns < SAVING_S * 1e9:
            return bool(self._follower.edits.base(path))
        return is_being_written(self._follower.cache.absolute(path))

    def _is_hopeless(self, path: str) -> bool:
        refused = self._refused.get(path)
        return refused is not None and (refused[0], refused[2]) == (self._signature(path), self._following.welcome)

    def _note_refusal(self, path: str, found: Signature | None, why: str) -> tuple[str, str]:
        self._refused[path] = (found, why, self._following.welcome)
        return "refused", f"{path} was not sent: {why}"

    def _signature(self, path: str) -> Signature | None:
        return self._follower.cache.signature(path)


def _new_id() -> str:
    return os.urandom(16).hex()
