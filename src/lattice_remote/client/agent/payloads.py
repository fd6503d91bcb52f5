"""Fetches the large contents of artifacts that a copy has left out, in its own time: nobody waits for them.

On a connection of their own, one after the other, each in pieces that stay on the disk (``.lattice/.fetch``): after a
cut, another start or another process it goes on from there. A content gets its place once it has its digest.
What is fetched unasked is a setting (``preferences.py``); what is asked for comes first.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from filelock import FileLock, Timeout

from lattice_remote.client import config
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.connection.pool import ConnectionPool
from lattice_remote.client.connection.upload import Source
from lattice_remote.errors import ConnectionFailed, Rejected, RemoteError, StorageError
from lattice_remote.protocol.effects import Content
from lattice_remote.protocol.messages import Download, Downloaded, Refused, Request, Response
from lattice_remote.protocol.replica import LARGE_BYTES

__all__ = ["DownloadConnection", "Fetching", "ask_what_it_is", "pieces"]

_PIECE_BYTES = 256 * 1024
_WINDOW = 8
"""Pieces asked for at once: enough to fill a line, little enough for others on it to be served soon."""


class DownloadConnection(Protocol):
    """What carries requests: a ``Link``."""

    async def ask(self, frame: Request) -> Response:
        """Send a request and return its answer."""


async def ask_what_it_is(link: DownloadConnection, path: str) -> tuple[Content, int]:
    """Return what a file is on the server, and at which number.

    Raises:
        Rejected: REMOTE_NOT_FOUND when there is none.
        ConnectionFailed: the server is out of reach.
    """
    answer = await _ask(link, Download(os.urandom(16).hex(), path, limit=1))
    return (answer.size, answer.digest), answer.seq


async def pieces(link: DownloadConnection, path: str, content: Content, offset: int) -> AsyncGenerator[bytes]:
    """Yield a content from ``offset`` to its end, in order. That it has its digest is for the caller to check.

    Raises:
        Rejected: REMOTE_NOT_FOUND when the file has another content by now.
        ConnectionFailed: the server is out of reach; go on later from what has come.
    """
    size, digest = content
    under_way: deque[asyncio.Task[Downloaded]] = deque()
    asked = offset
    try:
        while offset < size:
            while asked < size and len(under_way) < _WINDOW:
                wanted = min(_PIECE_BYTES, size - asked)
                frame = Download(os.urandom(16).hex(), path, digest, asked, wanted)
                under_way.append(asyncio.create_task(_ask(link, frame)))
                asked += wanted
            answer = await under_way.popleft()
            expected = min(_PIECE_BYTES, size - offset)
            if len(answer.data) != expected or (answer.size, answer.digest) != content:
                raise ConnectionFailed(f"the server sent something else than was asked for of {path}")
            offset += expected
            yield answer.data
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _ask(link: DownloadConnection, frame: Download) -> Downloaded:
    answer = await link.ask(frame)
    if isinstance(answer, Refused):
        raise Rejected(answer.message, code=answer.code)
    if not isinstance(answer, Downloaded):
        raise ConnectionFailed("the server answered something else")
    return answer


_RETRY_S = 5.0
"""After the server was out of reach."""
_PUT_OFF_S = 60.0
"""One that can't be had now (a full disk, a quota, a content that is not what was announced) is left alone for so long;
the others go on."""
_PATIENCE_S = 5.0
"""Who waits for a content waits no longer for a server that is gone."""
_LOOK_S = 60.0
_POLL_S = 0.1
_OWN_TURN_S = 2.0
"""A command that attaches waits no longer for another process that fetches."""
_LOCK = ".fetch.lock"
_MIB = 1024 * 1024
_MAX_MISFITS = 3
_log = logging.getLogger(__name__)


class _PutOff(NamedTuple):
    """One that could not be had."""

    until: float
    why: RemoteError
    content: Content | None
    """What it was then: another one is tried at once."""


class Fetching:
    """The contents of one cache that are left out; they come while ``run()`` runs."""

    def __init__(self, follower: Replicator, links: ConnectionPool) -> None:
        self._follower = follower
        self._cache = follower.cache
        self._links = links
        self._link = links.following
        self._lock = FileLock(self._cache.absolute(_LOCK), thread_local=False, mode=0o600)
        self._asked: Counter[str] = Counter()  # by how many
        self._own: set[bytes] = set()  # digests that are being attached here: they need no fetching
        self._wishes = 0  # how often somebody has asked for something
        self._seen: tuple[int, str, int] | None = None  # for which everything was done that is to be done
        self._looked_at: dict[str, Content | None] = {}  # which local files were compared, and with what
        self._misfits: Counter[bytes] = Counter()
        self._put_off: dict[str, _PutOff] = {}
        self._not_before = 0.0
        self._current: tuple[str, int, int] | None = None
        self._failure: RemoteError | None = None  # of the connection, when it last ended so

    @property
    def mode(self) -> str:
        """What is fetched unasked: ``background`` (everything) or ``on-demand`` (nothing)."""
        return config.read(self._cache.directory)["payloads"]

    def status(self) -> dict[str, Any]:
        """Return what is left out, and what is being fetched."""
        known = [content[0] for content in self._follower.replica.away.values() if content is not None]
        fetching = None
        if self._current is not None:
            fetching = dict(zip(("path", "done", "total"), self._current, strict=True))
        return {
            "mode": self.mode,
            "away": len(self._follower.replica.away),
            "away_bytes": sum(known),
            "fetching": fetching,
            "trouble": None if self.trouble is None else self.trouble.message,
        }

    @property
    def trouble(self) -> RemoteError | None:
        """Why something that is to be fetched does not come; None when nothing is in its way."""
        reasons = [why for path in self._put_off if (why := self._why_put_off(path)) is not None]
        return next(iter(reasons), self._failure)

    def _why_put_off(self, path: str) -> RemoteError | None:
        """Return why a content is left alone; None when it is not, or when it is another by now."""
        put_off, away = self._put_off.get(path), self._follower.replica.away
        return put_off.why if put_off is not None and path in away and away[path] == put_off.content else None

    # --- what is asked for ---

    async def fetch(self, paths: Iterable[str] | None, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Fetch these contents, None for all that are left out; return which have come.

        Raises:
            RemoteError: one can't be fetched; what has come of it stays.
        """
        away = self._follower.replica.away
        wanted = [path for path in (list(away) if paths is None else paths) if path in away]
        size = sum(content[0] for path in wanted if (content := away[path]) is not None)
        self._asked.update(wanted)
        for path in wanted:
            self._put_off.pop(path, None)
        self._failure, self._not_before = None, 0.0
        self.wake()
        try:
            await self._until_here(wanted, report)
        finally:
            self._asked -= Counter(wanted)
            report({"what": "", "done": 1, "total": 1})
        return {"fetched": wanted, "bytes": size}

    async def _until_here(self, wanted: list[str], report: Callable[[dict[str, Any]], None]) -> None:
        open_at = time.monotonic()
        while missing := [path for path in wanted if path in self._follower.replica.away]:
            if reasons := [why for path in missing if (why := self._why_put_off(path)) is not None]:
                raise reasons[0]
            if self._failure is not None:
                raise self._failure
            if self._link.is_open:
                open_at = time.monotonic()
            elif self._link.is_refused or time.monotonic() - open_at > _PATIENCE_S:
                raise self._link.unreachable(is_write=False)
            if self._current is not None:
                path, done, total = self._current
                name = f"{os.path.basename(path)[:40]} ({len(wanted) - len(missing) + 1} of {len(wanted)}), MiB:"
                report({"what": name, "done": round(done / _MIB, 1), "total": round(total / _MIB, 1)})
            await asyncio.sleep(_POLL_S)

    def wake(self) -> None:
        """Something may be to be done: a setting was changed, or somebody asks."""
        self._wishes += 1
        self._link.changed.notify()

    @contextlib.contextmanager
    def attaching(self, digests: Iterable[bytes]) -> Iterator[None]:
        """Within this, these contents are not fetched: they are here, and are put in place by ``take_own``."""
        own = set(digests) - self._own
        self._own |= own
        try:
            yield
        finally:
            self._own -= own
            self.wake()

    async def take_own(self, sources: Iterable[Source]) -> None:
        """What was attached here need not come from the server. What doesn't work is fetched."""
        for source in sources:
            content = (source.size, source.digest)
            for path in [path for path, away in self._follower.replica.away.items() if away == content]:
                partial = self._cache.partial(source.digest)
                with contextlib.suppress(RemoteError, OSError, TimeoutError):
                    async with _taken(self._lock, _OWN_TURN_S):
                        if await asyncio.to_thread(self._copied, source, partial):
                            await self._follower.arrived(path, content, partial)

    def _copied(self, source: Source, partial: str) -> bool:
        """Copy a file of the caller's; return whether it still had the content that was sent."""
        self._cache.quota.require_room(source.size)
        self._cache.discard(partial)
        hasher, offset = hashlib.sha256(), 0
        while piece := os.pread(source.descriptor, _MIB, offset):
            hasher.update(piece)
            self._cache.add(partial, piece)
            offset += len(piece)
        is_same = hasher.digest() == source.digest
        if not is_same:
            self._cache.discard(partial)
        return is_same

    # --- the task ---

    async def run(self) -> None:
        """Fetch until cancelled. Trouble with the server or the disk is waited out."""
        while True:
            if not await self._link.changed.until(self._has_work, self._pause_s()):
                continue
            try:
                await self._work()
            except RemoteError as error:
                self._failed(error)
            except Exception as error:  # noqa: BLE001 - a defect of ours must not end this silently
                _log.exception("fetching for %s failed", self._cache.directory)
                self._failed(RemoteError(f"internal error: {error!r}"))
            finally:
                self._current = None

    def _pause_s(self) -> float:
        now, times = time.monotonic(), [put_off.until for put_off in self._put_off.values()]
        if self._failure is not None:
            times.append(self._not_before)
        return max(_POLL_S, min([_LOOK_S, *(at - now for at in times)]))

    def _failed(self, error: RemoteError) -> None:
        self._failure, self._not_before = error, time.monotonic() + _RETRY_S

    def _has_work(self) -> bool:
        now = time.monotonic()
        can_work = self._link.is_open and self._follower.is_following and now >= self._not_before
        return can_work and (self._seen != self._state() or any(one.until <= now for one in self._put_off.values()))

    def _state(self) -> tuple[int, str, int]:
        replica = self._follower.replica
        return replica.away_version, self.mode if replica.away else "", self._wishes

    async def _work(self) -> None:
        """Fetch everything that is to be fetched now."""
        state, now = self._state(), time.monotonic()
        self._put_off = {path: put_off for path, put_off in self._put_off.items() if put_off.until > now}
        if self._next() is not None and self._link.token is not None:
            async with _taken(self._lock, None), self._links.bulk(self._link.token) as link:
                while (path := self._next()) is not None:
                    await self._settle_or_put_off(link, path)
        away = self._follower.replica.away
        if not self._own:
            self._cache.discard_partials(content[1] for content in away.values() if content is not None)
        self._looked_at = {path: content for path, content in self._looked_at.items() if path in away}
        self._failure = None
        if state == self._state() and self._follower.is_following:
            self._seen = state

    async def _settle_or_put_off(self, link: Connection, path: str) -> None:
        """Do what is to be done for one; what is in the way of this one holds up no other."""
        content = self._follower.replica.away[path]
        try:
            await self._settle(link, path, content)
        except ConnectionFailed:
            raise
        except RemoteError as error:
            self._put_off[path] = _PutOff(time.monotonic() + _PUT_OFF_S, error, content)
        finally:
            self._current = None

    def _next(self) -> str | None:
        """Return what is to be looked at or fetched: first what was asked for."""
        if not self._follower.is_following:
            return None  # nothing could be put in place
        away, is_unasked = self._follower.replica.away, self.mode == "background"
        for path in self._asked:
            if path in away and self._why_put_off(path) is None:
                return path
        for path, content in away.items():
            if self._why_put_off(path) is not None or (content is not None and content[1] in self._own):
                continue
            is_new = path not in self._looked_at or self._looked_at[path] != content
            if is_unasked or is_new or content is None or content[0] <= LARGE_BYTES:
                return path
        return None

    async def _settle(self, link: Connection, path: str, content: Content | None) -> None:
        """Find out what a file is, whether it is here after all, and else, if it is wanted, fetch it."""
        if content is None:
            await self._learn(link, path)
            return
        if self._looked_at.get(path) != content:
            self._looked_at[path] = content
            if await self._is_here(path, content):
                return
        if path in self._asked or self.mode == "background" or content[0] <= LARGE_BYTES:
            await self._fetch(link, path, content)
        else:
            await self._follower.vacate(path, content)

    async def _learn(self, link: Connection, path: str) -> None:
        try:
            content, seq = await ask_what_it_is(link, path)
        except Rejected as rejected:
            if rejected.code != "REMOTE_NOT_FOUND":
                raise
            await self._link.carry_out(await self._follower.bring(path))
            return
        replica = self._follower.replica
        if not await self._link.changed.until(lambda: replica.position.seq >= seq, _RETRY_S):
            raise StorageError(f"the copy does not get to change {seq}, of which the server sends {path}")
        await self._follower.learned(path, content, seq)  # unless a change has said more, or it is wanted no longer

    async def _is_here(self, path: str, content: Content) -> bool:
        """Whether the file has this content already: it was put there before a crash, say, or by other hands."""
        before = self._cache.signature(path)
        if before is None or before[1] != content[0]:
            return False
        digest = await asyncio.to_thread(self._cache.digest, path)
        is_same = digest == content[1] and self._cache.signature(path) == before
        return is_same and await self._follower.arrived(path, content, None)

    async def _fetch(self, link: Connection, path: str, content: Content) -> None:
        size, digest = content
        partial = self._cache.partial(digest)
        have = self._cache.size(partial) or 0
        if have > size:
            self._cache.discard(partial)
            have = 0
        await asyncio.to_thread(self._cache.quota.require_room, size - have)
        self._current = (path, have, size)
        async with contextlib.aclosing(pieces(link, path, content, have)) as coming:
            async for piece in coming:
                try:
                    await asyncio.to_thread(self._cache.add, partial, piece)
                except StorageError:
                    self._cache.discard(partial)  # a full disk would stay full of this
                    raise
                have += len(piece)
                self._current = (path, have, size)
                if self._follower.replica.away.get(path) != content:
                    return  # a change has made it another; what has come is forgotten
        await self._place(path, content, partial)

    async def _place(self, path: str, content: Content, partial: str) -> None:
        if not content[0]:
            self._cache.add(partial, b"")
        if await asyncio.to_thread(self._cache.digest, partial) != content[1]:
            self._cache.discard(partial)
            self._misfits[content[1]] += 1
            if self._misfits[content[1]] >= _MAX_MISFITS:
                del self._misfits[content[1]]
                raise StorageError(f"what the server sends of {path} is not what it has announced; its disk may be bad")
            return
        self._misfits.pop(content[1], None)
        await self._follower.arrived(path, content, partial)


@contextlib.asynccontextmanager
async def _taken(lock: FileLock, timeout_s: float | None) -> AsyncIterator[None]:
    """Hold the lock of those who fetch for one cache: two processes must not write into one file.

    Raises:
        TimeoutError: another has it for longer.
    """
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                await asyncio.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()
