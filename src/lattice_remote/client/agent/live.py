"""Sends what people edit as soon as it is saved, without being asked.

A file is sent once it has been the same for a moment and nobody has it open for writing, so that what an editor
writes in pieces is read whole. What can't be sent now is kept, and sent when the server is back. In whose name: see
``Links.live``.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable

from lattice_remote.client.agent.pushing import SAVING_S, Pusher
from lattice_remote.client.cache.follower import Follower
from lattice_remote.client.cache.known import Signature
from lattice_remote.client.link.link import Link
from lattice_remote.client.link.links import Links
from lattice_remote.errors import RemoteError

__all__ = ["Live"]

QUIET_S = 0.1
"""A file is taken for saved when it has been the same for this long."""
LONGEST_SAVE_S = 30.0
"""A program that keeps a file open for longer is not waited for: what it has written so far is sent."""
_POLL_S = 0.04
_RETRY_S = 1.0
_LOOK_AT_HELD_S = 0.5
_BURST = 3
"""When more files than this are edited at once, a program may be at work on more: its end is waited for."""
_BURST_QUIET_S = 1.0
_BURST_POLL_S = 0.25
_log = logging.getLogger(__name__)


class _Seen:
    """A file as it was last looked at."""

    __slots__ = ("at", "began", "signature")

    def __init__(self, signature: Signature | None, now: float) -> None:
        self.signature = signature
        self.at = now
        """Since when it is like this."""
        self.began = now


class Live:
    """The edits of one cache that nobody has asked to send yet; they go out while ``run()`` runs."""

    def __init__(self, follower: Follower, links: Links, pusher: Pusher) -> None:
        self._follower = follower
        self._links = links
        self._pusher = pusher
        self._seen: dict[str, _Seen] = {}
        self._wake = asyncio.Event()
        self.notices: list[str] = []
        """What the next command should say."""

    def touched(self, paths: Iterable[str]) -> None:
        """These plans and notes may have been edited."""
        now = time.monotonic()
        for path in paths:
            if path not in self._seen:
                self._seen[path] = _Seen(self._follower.cache.signature(path), now)
        self._wake.set()

    # --- the task ---

    async def run(self) -> None:
        """Send edits until cancelled. Trouble with the server is waited out."""
        while True:
            try:
                await self._pause()
                await self._push_saved()
                await self._look_at_held()
            except RemoteError:
                await asyncio.sleep(_RETRY_S)  # said by the link, and by the next command
            except Exception:  # noqa: BLE001 - a defect of ours must not end this silently
                _log.exception("sending the edits of %s failed", self._follower.cache.directory)
                await asyncio.sleep(_RETRY_S)

    async def _pause(self) -> None:
        """Wait for something to look at."""
        if self._seen:
            await asyncio.sleep(_POLL_S)
            return
        self._wake.clear()
        held = bool(self._follower.replica.held)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_AT_HELD_S if held else None):
                await self._wake.wait()

    async def _push_saved(self) -> None:
        saved = [path for path in self._seen if self._is_saved(path)]
        edited = [path for path in saved if self._is_edit(path)]
        for path in set(saved).difference(edited):
            del self._seen[path]
        if not edited:
            return
        if self._is_burst(edited):
            await asyncio.sleep(_BURST_POLL_S)
            return
        if not self._can_send():
            await self._pusher.note_saves(edited)
            await self._links.following.changed.until(self._can_send, SAVING_S)
            return
        link = self._links.live()
        assert link is not None, "_can_send() says so, and nothing was awaited since"
        await self._push(link, edited, {path: self._seen.pop(path) for path in edited})

    def _is_burst(self, edited: list[str]) -> bool:
        """Return whether a program seems to be at work on many files, and has not come to its end."""
        now = time.monotonic()
        quiet_s = now - max(self._seen[path].at for path in edited)
        lasts_s = now - min(self._seen[path].began for path in edited)
        return len(edited) > _BURST and quiet_s < _BURST_QUIET_S and lasts_s < LONGEST_SAVE_S

    async def _push(self, link: Link, edited: list[str], seen: dict[str, _Seen]) -> None:
        try:
            pushed = await self._pusher.push(link, edited)
        except BaseException:
            self._seen = seen | self._seen
            raise
        self.notices += [notice for notice in pushed.notices if notice not in self.notices]

    def _is_edit(self, path: str) -> bool:
        """Whether there is something to send; what belongs to no task is set aside by the caretaker."""
        return self._follower.edits.is_edited(path) and not self._follower.files.is_orphan(path)

    def _can_send(self) -> bool:
        link = self._links.live()
        return self._follower.is_following and link is not None and not link.is_refused

    def _is_saved(self, path: str) -> bool:
        """Whether a file has come to rest."""
        now, seen = time.monotonic(), self._seen[path]
        found = self._follower.cache.signature(path)
        if found != seen.signature:
            seen.signature, seen.at = found, now
            return False
        if now - seen.at < QUIET_S:
            return False
        return now - seen.began > LONGEST_SAVE_S or not self._pusher.is_being_saved(path)

    async def _look_at_held(self) -> None:
        """Fetch what waited for an edit that is none any more."""
        await self._links.following.carry_out(await self._follower.look_at_edits())
