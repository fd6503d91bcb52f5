"""Contents of files: those of commands are sent, large ones of artifacts fetched.

A command's small files travel within it, large ones before it: they are read in place, once for the digest and once
for the parts that the server lacks.

Deferred contents are fetched one at a time on a separate connection. Their pieces stay in ``.remote/downloads/``, so a
download resumes after a cut, a restart or in another process. The file is replaced once the digest matches. Requested
contents come first; the others depend on a setting (see ``config``).
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import stat
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from lattice_remote.client import config
from lattice_remote.client.agent_runtime import new_request_id
from lattice_remote.client.attachments import identity
from lattice_remote.client.cache.cache import CacheLock
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.config import PRIVATE_DIRECTORY
from lattice_remote.client.connection.connection import Connection, RequestSender, expect
from lattice_remote.client.connection.pool import ConnectionPool
from lattice_remote.client.connection.upload import Source, upload
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, RemoteError, StorageError
from lattice_remote.protocol.messages import (
    MAX_ARGV,
    MAX_PAYLOAD_BYTES,
    Attachment,
    Call,
    Download,
    Downloaded,
    Refused,
    Response,
    Run,
)
from lattice_remote.protocol.operations import Content
from lattice_remote.protocol.replica import LARGE_BYTES

__all__ = [
    "OpenFile",
    "PayloadFetcher",
    "Unreadable",
    "call_frame",
    "describe_content",
    "opened_files",
    "pieces",
    "run_frame",
    "send_files",
]


_PIECE_BYTES = 256 * 1024
_WINDOW = 8
"""Pieces requested at once: enough to fill a line, few enough to leave room for others."""


async def describe_content(connection: RequestSender, path: str) -> tuple[Content, int]:
    """Return a file's content on the server, and its sequence number.

    Raises:
        Rejected: REMOTE_NOT_FOUND if there is no such file.
        ConnectionFailed: the server is unreachable.
    """
    answer = expect(await connection.send_request(Download(new_request_id(), path, limit=1)), Downloaded)
    return (answer.size, answer.digest), answer.seq


async def pieces(connection: RequestSender, path: str, content: Content, offset: int) -> AsyncGenerator[bytes]:
    """Yield a content from ``offset`` on, in order; the caller checks the digest.

    Raises:
        Rejected: REMOTE_NOT_FOUND if the content has changed.
        ConnectionFailed: the server is unreachable; resume later.
    """
    size, digest = content
    under_way: deque[asyncio.Task[Response]] = deque()
    asked = offset
    try:
        while offset < size:
            while asked < size and len(under_way) < _WINDOW:
                wanted = min(_PIECE_BYTES, size - asked)
                frame = Download(new_request_id(), path, digest, asked, wanted)
                under_way.append(asyncio.create_task(connection.send_request(frame)))
                asked += wanted
            answer = expect(await under_way.popleft(), Downloaded)
            expected = min(_PIECE_BYTES, size - offset)
            if len(answer.data) != expected or (answer.size, answer.digest) != content:
                raise ConnectionFailed(f"unexpected data from the server for {path}")
            offset += expected
            yield answer.data
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


_RETRY_S = 5.0
"""Delay after the server was unreachable."""
_PUT_OFF_S = 60.0
"""Delay of a content that failed (full disk, quota, wrong digest); others continue."""
_PATIENCE_S = 5.0
"""Longest wait of a request for an unreachable server."""
_LOOK_S = 60.0
_POLL_S = 0.1
_OWN_TURN_S = 2.0
"""Longest wait of an attaching command for another process that fetches."""
_LOCK = f"{PRIVATE_DIRECTORY}/downloads.lock"
_MIB = 1024 * 1024
_MAX_MISFITS = 3
_log = logging.getLogger(__name__)


class _PutOff(NamedTuple):
    until: float
    why: RemoteError
    content: Content | None
    """Its content at that time; another one is tried at once."""


class PayloadFetcher:
    def __init__(self, replicator: Replicator, pool: ConnectionPool) -> None:
        self._replicator = replicator
        self._cache = replicator.cache
        self._pool = pool
        self._connection = pool.following
        self._lock = self._cache.file_lock(_LOCK)
        self._asked: Counter[str] = Counter()  # path -> number of requesters
        self._own: set[bytes] = set()  # digests being attached here: they need no download
        self._wishes = 0  # number of requests so far
        self._seen: tuple[int, str, int] | None = None  # state for which all work was done
        self._looked_at: dict[str, Content | None] = {}  # content with which each local file was compared
        self._misfits: Counter[bytes] = Counter()
        self._put_off: dict[str, _PutOff] = {}
        self._not_before = 0.0
        self._current: tuple[str, int, int] | None = None
        self._failure: RemoteError | None = None  # the connection's last error

    @property
    def mode(self) -> str:
        return config.read_settings(self._cache.directory)["payloads"]

    def status(self) -> dict[str, Any]:
        known = [content[0] for content in self._replicator.replica.deferred.values() if content is not None]
        fetching = None
        if self._current is not None:
            fetching = dict(zip(("path", "done", "total"), self._current, strict=True))
        return {
            "mode": self.mode,
            "deferred": len(self._replicator.replica.deferred),
            "deferred_bytes": sum(known),
            "fetching": fetching,
            "trouble": None if self.trouble is None else self.trouble.message,
        }

    @property
    def trouble(self) -> RemoteError | None:
        reasons = [why for path in self._put_off if (why := self._why_put_off(path)) is not None]
        return next(iter(reasons), self._failure)

    def _why_put_off(self, path: str) -> RemoteError | None:
        put_off, deferred = self._put_off.get(path), self._replicator.replica.deferred
        return put_off.why if put_off is not None and path in deferred and deferred[path] == put_off.content else None

    # --- requests ---

    async def fetch(self, paths: Iterable[str] | None, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Fetch these contents (None: all deferred); return those that arrived.

        Raises:
            RemoteError: one cannot be fetched; its pieces are kept.
        """
        deferred = self._replicator.replica.deferred
        wanted = [path for path in (list(deferred) if paths is None else paths) if path in deferred]
        size = sum(content[0] for path in wanted if (content := deferred[path]) is not None)
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
        while missing := [path for path in wanted if path in self._replicator.replica.deferred]:
            if reasons := [why for path in missing if (why := self._why_put_off(path)) is not None]:
                raise reasons[0]
            if self._failure is not None:
                raise self._failure
            if self._connection.is_open:
                open_at = time.monotonic()
            elif self._connection.is_refused or time.monotonic() - open_at > _PATIENCE_S:
                raise self._connection.unreachable(is_write=False)
            if self._current is not None:
                path, done, total = self._current
                name = f"{os.path.basename(path)[:40]} ({len(wanted) - len(missing) + 1} of {len(wanted)}), MiB:"
                report({"what": name, "done": round(done / _MIB, 1), "total": round(total / _MIB, 1)})
            await asyncio.sleep(_POLL_S)

    def wake(self) -> None:
        self._wishes += 1
        self._connection.changed.notify()

    @contextlib.contextmanager
    def attaching(self, digests: Iterable[bytes]) -> Iterator[None]:
        own = set(digests) - self._own
        self._own |= own
        try:
            yield
        finally:
            self._own -= own
            self.wake()

    async def take_own(self, sources: Iterable[Source]) -> None:
        for source in sources:
            content = (source.size, source.digest)
            for path in [path for path, deferred in self._replicator.replica.deferred.items() if deferred == content]:
                partial = self._cache.partial(source.digest)
                with contextlib.suppress(RemoteError, OSError, TimeoutError):
                    async with _taken(self._lock, _OWN_TURN_S):
                        if await asyncio.to_thread(self._copied, source, partial):
                            await self._replicator.arrived(path, content, partial)

    def _copied(self, source: Source, partial: str) -> bool:
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
        while True:
            if not await self._connection.changed.until(self._has_work, self._pause_s()):
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
        can_work = self._connection.is_open and self._replicator.is_following and now >= self._not_before
        return can_work and (self._seen != self._state() or any(one.until <= now for one in self._put_off.values()))

    def _state(self) -> tuple[int, str, int]:
        replica = self._replicator.replica
        return replica.deferred_version, self.mode if replica.deferred else "", self._wishes

    async def _work(self) -> None:
        state, now = self._state(), time.monotonic()
        self._put_off = {path: put_off for path, put_off in self._put_off.items() if put_off.until > now}
        if self._next() is not None and self._connection.token is not None:
            async with _taken(self._lock, None), self._pool.bulk(self._connection.token) as connection:
                while (path := self._next()) is not None:
                    await self._settle_or_put_off(connection, path)
        deferred = self._replicator.replica.deferred
        if not self._own:
            self._cache.discard_partials(content[1] for content in deferred.values() if content is not None)
        self._looked_at = {path: content for path, content in self._looked_at.items() if path in deferred}
        self._failure = None
        if state == self._state() and self._replicator.is_following:
            self._seen = state

    async def _settle_or_put_off(self, connection: Connection, path: str) -> None:
        content = self._replicator.replica.deferred[path]
        try:
            await self._settle(connection, path, content)
        except ConnectionFailed:
            raise
        except RemoteError as error:
            self._put_off[path] = _PutOff(time.monotonic() + _PUT_OFF_S, error, content)
        finally:
            self._current = None

    def _next(self) -> str | None:
        if not self._replicator.is_following:
            return None  # nothing could be put in place
        deferred, is_unasked = self._replicator.replica.deferred, self.mode == "background"
        for path in self._asked:
            if path in deferred and self._why_put_off(path) is None:
                return path
        for path, content in deferred.items():
            if self._why_put_off(path) is not None or (content is not None and content[1] in self._own):
                continue
            is_new = path not in self._looked_at or self._looked_at[path] != content
            if is_unasked or is_new or content is None or content[0] <= LARGE_BYTES:
                return path
        return None

    async def _settle(self, connection: Connection, path: str, content: Content | None) -> None:
        """Fetch a content that is due, unless the file has it already, as after a crash."""
        if content is None:
            await self._learn(connection, path)
            return
        if self._looked_at.get(path) != content:
            self._looked_at[path] = content
            if await self._is_here(path, content):
                return
        if path in self._asked or self.mode == "background" or content[0] <= LARGE_BYTES:
            await self._fetch(connection, path, content)
        else:
            await self._replicator.vacate(path, content)

    async def _learn(self, connection: Connection, path: str) -> None:
        try:
            content, seq = await describe_content(connection, path)
        except Rejected as rejected:
            if rejected.code != "REMOTE_NOT_FOUND":
                raise
            await self._connection.carry_out(await self._replicator.bring(path))
            return
        replica = self._replicator.replica
        if not await self._connection.changed.until(lambda: replica.position.seq >= seq, _RETRY_S):
            raise StorageError(f"the cache does not reach change {seq}, at which the server sends {path}")
        await self._replicator.learned(
            path, content, seq
        )  # unless a newer change replaced it, or it is no longer needed

    async def _is_here(self, path: str, content: Content) -> bool:
        before = self._cache.signature(path)
        if before is None or before[1] != content[0]:
            return False
        digest = await asyncio.to_thread(self._cache.digest, path)
        is_same = digest == content[1] and self._cache.signature(path) == before
        return is_same and await self._replicator.arrived(path, content, None)

    async def _fetch(self, connection: Connection, path: str, content: Content) -> None:
        size, digest = content
        partial = self._cache.partial(digest)
        have = self._cache.size(partial) or 0
        if have > size:
            self._cache.discard(partial)
            have = 0
        await asyncio.to_thread(self._cache.quota.require_room, size - have)
        self._current = (path, have, size)
        async with contextlib.aclosing(pieces(connection, path, content, have)) as coming:
            async for piece in coming:
                try:
                    await asyncio.to_thread(self._cache.add, partial, piece)
                except StorageError:
                    self._cache.discard(partial)  # else a full disk would stay full
                    raise
                have += len(piece)
                self._current = (path, have, size)
                if self._replicator.replica.deferred.get(path) != content:
                    return  # a change replaced the content; its pieces are dropped
        await self._place(path, content, partial)

    async def _place(self, path: str, content: Content, partial: str) -> None:
        if not content[0]:
            self._cache.add(partial, b"")
        if await asyncio.to_thread(self._cache.digest, partial) != content[1]:
            self._cache.discard(partial)
            self._misfits[content[1]] += 1
            if self._misfits[content[1]] >= _MAX_MISFITS:
                del self._misfits[content[1]]
                raise StorageError(f"the server's content of {path} is not the announced one; its disk may be damaged")
            return
        self._misfits.pop(content[1], None)
        await self._replicator.arrived(path, content, partial)


@contextlib.asynccontextmanager
async def _taken(lock: CacheLock, timeout_s: float | None) -> AsyncIterator[None]:
    """Hold a cache's download lock: two processes must not write one file. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not lock.acquire():  # noqa: ASYNC110 - another process releases it
            await asyncio.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()


# --- files of commands ---

_ATTEMPTS = 3

ProgressCallback = Callable[[dict[str, Any]], None]


class Unreadable(Exception):
    """A file of the caller that cannot be opened here, or is not the same file."""


@dataclass(frozen=True, slots=True)
class OpenFile:
    index: int
    name: str
    data: bytes | None
    descriptor: int | None


@contextlib.contextmanager
def opened_files(described: list[dict[str, Any]]) -> Iterator[list[OpenFile]]:
    """Open the files described by ``CallersFiles``. Raises Unreadable."""
    with contextlib.ExitStack() as stack:
        files: list[OpenFile] = []
        for file in described:
            data, descriptor = None, None
            if file.get("path") is not None:
                descriptor = _open(file["path"], file["identity"])
                stack.callback(os.close, descriptor)
            elif file["data"] is not None:
                data = base64.b64decode(file["data"])
            files.append(OpenFile(file["index"], file["name"].encode(errors="replace").decode(), data, descriptor))
        yield files


def _open(path: str, expected: list[int]) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(path) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or identity(status) != expected:
        os.close(descriptor)
        raise Unreadable(path)
    return descriptor


async def send_files(
    files: list[OpenFile],
    bulk: Callable[[], AbstractAsyncContextManager[Connection]],
    run: Callable[[list[Attachment]], Awaitable[Response]],
    report: ProgressCallback,
) -> tuple[Response, list[Source]]:
    """Upload large files, then ``run`` with attachments that refer to them; return answer and uploads.

    An upload that another command has used is repeated.

    Raises:
        Rejected, ConnectionFailed, StorageError: see ``upload``; nothing was run.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        attachments, sources = await _upload_all(files, bulk, report)
        answer = await run(attachments)
        if not (isinstance(answer, Refused) and answer.code == "REMOTE_NOT_UPLOADED" and attempts_left):
            return answer, sources
    raise AssertionError("the last attempt returns")


async def _upload_all(
    files: list[OpenFile], bulk: Callable[[], AbstractAsyncContextManager[Connection]], report: ProgressCallback
) -> tuple[list[Attachment], list[Source]]:
    attachments: list[Attachment] = []
    sources: list[Source] = []
    for file in files:
        if file.descriptor is None:
            attachments.append(Attachment(file.index, file.name, file.data))
            continue
        try:
            source = await Source.of(file.descriptor)
        except OSError as error:
            raise StorageError(f"cannot read {file.name}: {error.strerror}") from error
        async with bulk() as connection:
            await _upload(connection, source, file.name, report)
        attachments.append(Attachment(file.index, file.name, digest=source.digest, size=source.size))
        sources.append(source)
    return attachments, sources


async def _upload(connection: Connection, source: Source, name: str, report: ProgressCallback) -> None:
    there = 0

    def show(have: int, size: int) -> None:
        nonlocal there
        there = have
        report({"what": f"{name[:40]}, MiB sent:", "done": round(have / _MIB, 1), "total": round(size / _MIB, 1)})

    try:
        await upload(connection, source, on_progress=show)
    except ConnectionFailed as error:
        kept = f"; the server has {there} of {source.size} bytes of {name}: repeat the command to resume"
        raise ConnectionFailed(error.message + (kept if there else ""), code=error.code) from error


_MAX_NAME_CHARS = 256


def run_frame(request: dict[str, Any]) -> Run:
    argv = request["argv"]
    if not 0 < len(argv) <= MAX_ARGV:
        raise Misuse(f"too many arguments: at most {MAX_ARGV}")
    try:
        "\0".join(argv).encode()
    except UnicodeEncodeError:
        raise Misuse("an argument is not valid UTF-8") from None
    return Run(id=request["id"], argv=argv)


def call_frame(request: dict[str, Any]) -> Call:
    try:
        request["name"].encode()
        payload = request["payload"].encode()
    except UnicodeEncodeError:
        raise Misuse("the request is not valid UTF-8") from None
    if len(payload) > MAX_PAYLOAD_BYTES or len(request["name"]) > _MAX_NAME_CHARS:
        raise Misuse(f"the request is over {MAX_PAYLOAD_BYTES >> 20} MiB", code="REMOTE_TOO_LARGE")
    surface, name = request["surface"], request["name"]
    return Call(id=request["id"], surface=surface, name=name, payload=payload)
