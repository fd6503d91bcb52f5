"""Reader processes of a project, seen from the server, with a cache of their results.

A process starts on demand and ends when idle or stuck. Reads run one at a time, tokens in turn. A result read while
the worker was idle is the tree at the head and serves equal reads until the next change. One that overlaps a
transaction waits until that is committed and durable (I2); after a rollback the read is repeated.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec
from msgspec import structs

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import (
    FrameBuffer,
    Read,
    ReadCommand,
    ReadPage,
    ReadResult,
    TreeState,
    encode_frames,
)
from lattice_remote.server.project.child_process import PYTHON, ChildProcess, StartChild, spawn_child
from lattice_remote.server.project.queue import FairLock
from lattice_remote.server.transport.admission import ResponseShare

__all__ = ["ReadCache", "ReaderProcess"]

_MAX_AGE_S = 5.0
"""Maximum age of a cached result; some contain relative times."""
_MAX_BYTES = 32 * 1024 * 1024
_OVERHEAD_BYTES = 1024

_ITEM_BYTES = 160


class ReadCache:
    def __init__(self) -> None:
        self._state: object | None = None
        self._answers: dict[Read, tuple[float, ReadResult]] = {}  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, request: Read, state: object | None) -> ReadResult | None:
        since, found = self._answers.get(request, (0.0, None))
        is_fresh = state is not None and state == self._state and _now() - since < _MAX_AGE_S
        return found if is_fresh else None

    def keep(self, request: Read, state: object, found: ReadResult) -> None:
        """Cache a result; evict those of other states, expired ones, and the oldest above the size limit."""
        if state != self._state:
            self._answers.clear()
            self._bytes, self._state = 0, state
        self._drop(request)
        self._answers[request] = _now(), found
        self._bytes += _weight_of(request, found)
        while len(self) > 1 and (self._bytes > _MAX_BYTES or _now() - self._oldest[1] >= _MAX_AGE_S):
            self._drop(self._oldest[0])

    @property
    def _oldest(self) -> tuple[Read, float]:
        request, (since, _) = next(iter(self._answers.items()))
        return request, since

    def _drop(self, request: Read) -> None:
        if (cached := self._answers.pop(request, None)) is not None:
            self._bytes -= _weight_of(request, cached[1])


def _now() -> float:
    return asyncio.get_running_loop().time()


def _weight_of(request: Read, found: ReadResult) -> int:
    said = sum(map(len, request.argv)) if isinstance(request, ReadCommand) else len(request.path)
    items = 0 if found.items is None else len(found.items.ids) * _ITEM_BYTES
    return _OVERHEAD_BYTES + said + len(found.body) + len(found.message) + items


_COMMAND = (*PYTHON, "lattice_remote.server.worker.reader")
_READ_S = 20.0
_MAX_WAITING = 256
"""Reads of one token that may wait."""
_RECEIVE_BYTES = 1 << 20
_MAX_FOUND_BYTES = 256 * 1024 * 1024

_TRIES_TO_COMMIT = 10
"""A rollback after changed files is rare; ten in a row are no coincidence."""
_COMMIT_S, _COMMIT_POLL_S = 10.0, 0.001
"""How long a read waits for an overlapping transaction, and the polling interval."""
_TRIES_TOGETHER = 4
_SETTLE_POLLS, _SETTLE_POLL_S = 25, 0.002
_SEPARATE_FILES = 5000
"""Number of files from which a project is large."""
_ALL_TASKS = {"activity", "stats", "archived", "git"}
"""Views whose reads take seconds in a large project."""

_decoder = msgspec.msgpack.Decoder(ReadResult)
_log = logging.getLogger(__name__)


class ReaderProcess:
    """Client of a project's reader process; ``close()`` it. Belongs to the event loop's thread.

    In a large project each kind of slow read has a process of its own, so that it delays no other view.

    Args:
        state: returns a name of the tree's state; None while a request is with the worker. While the name is the same,
            no file changes.
        durable: returns the epoch and the number of its newest durable change.
        idle_s: time after the last read when the process ends.
    """

    def __init__(
        self,
        slug: str,
        paths: ProjectPaths,
        state: Callable[[], object | None],
        durable: Callable[[], tuple[str, int]],
        *,
        count_files: Callable[[], int] = lambda: 0,
        idle_s: float = 300.0,
        start_child: StartChild = spawn_child,
    ) -> None:
        self._slug = slug
        self._paths = paths
        self._state = state
        self._durable = durable
        self._count_files = count_files
        self._others: dict[str, ReaderProcess] = {}  # by kind of slow read
        self._idle_s = idle_s
        self._start_child = start_child
        self._lock = FairLock()
        self._waiting: Counter[str] = Counter()  # by token
        self._cache = ReadCache()
        self._process: ChildProcess | None = None
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._holders = 0

    async def read(self, request: Read, share: ResponseShare | None = None) -> ReadResult:
        """Return the result of a read; it includes every change acknowledged before the call.

        It waits for the turn and the room of ``share``, its response; None for the server's own.

        Raises:
            Rejected: REMOTE_BUSY, too many reads of the token wait, it has too many responses outstanding, or the
                writes kept being undone.
            StorageError: the process cannot be started or timed out.
        """
        kind = _kind_of(request)
        if kind and not self._closed and self._count_files() >= _SEPARATE_FILES:
            if kind not in self._others:
                self._others[kind] = ReaderProcess(
                    *(self._slug, self._paths, self._state, self._durable),
                    idle_s=self._idle_s,
                    start_child=self._start_child,
                )
            return await self._others[kind].read(request, share)
        cached = self._cache.get(request, self._state())
        if cached is not None and (share is None or share.may_hold(cached.body)):
            return _reserve(cached, share)
        token_id = share.token_id if share is not None else ""
        if self._waiting[token_id] >= _MAX_WAITING:
            raise Rejected(f"{_MAX_WAITING} reads of this token wait in this project; try again", code="REMOTE_BUSY")
        self._waiting[token_id] += 1
        try:
            for _ in range(_TRIES_TO_COMMIT):
                found, before, epoch = await self._read_in_turn(request, token_id, share)
                if await self._is_committed(before, epoch):
                    return found
                if share is not None:
                    share.drop(found.body)
        finally:
            self._waiting[token_id] -= 1
            if not self._waiting[token_id]:
                del self._waiting[token_id]
        raise Rejected("the read overlapped writes that were undone, again and again; try again", code="REMOTE_BUSY")

    def _tree_state(self) -> TreeState:
        return TreeState.read(self._paths.journal)

    async def _is_committed(self, before: TreeState, epoch: str) -> bool:
        """Wait until all that a read may have seen is durable; return False after a rollback.

        Raises Rejected (REMOTE_BUSY) after ``_COMMIT_S``.
        """
        seen = now = self._tree_state()
        try:
            async with asyncio.timeout(_COMMIT_S):
                while now.is_open and now.ended == seen.ended:
                    await asyncio.sleep(_COMMIT_POLL_S)  # another process ends it: there is no event to wait for
                    now = self._tree_state()
                while now.rolled_back == before.rolled_back and self._is_ahead(epoch, now.seq):  # noqa: ASYNC110 - one fsync
                    await asyncio.sleep(_COMMIT_POLL_S)
        except TimeoutError:
            raise Rejected("timed out waiting for a write; try again", code="REMOTE_BUSY") from None
        return now.rolled_back == before.rolled_back and self._durable()[0] == epoch

    def _is_ahead(self, epoch: str, seq: int) -> bool:
        current, head = self._durable()
        return current == epoch and head < seq

    async def _read_in_turn(
        self, request: Read, token_id: str, share: ResponseShare | None
    ) -> tuple[ReadResult, TreeState, str]:
        while True:
            if share is not None:
                await share.room()
            async with self._lock.turn(token_id):
                if share is None or share.has_room:  # another response of its token may have taken the room
                    before, (epoch, _) = self._tree_state(), self._durable()
                    found = self._cache.get(request, self._state()) or await self._read(request)
                    return _reserve(found, share), before, epoch

    async def read_together(
        self, request: Sequence[Read], share: ResponseShare | None = None
    ) -> tuple[list[ReadResult], bool]:
        """Return the results of several reads, and whether all of them show the current state of the tree.

        Under constant writes they may show no common state; each still includes every change acknowledged before the
        call.
        """
        for _ in range(_TRIES_TOGETHER):
            if share is not None:
                share.close()  # the results of the previous try are discarded
            before = await self._settled()
            found = [await self.read(each, share) for each in request]
            if before is not None and before == self._state():
                return found, True
        return found, False

    async def _settled(self) -> object | None:
        """Return the state of the tree, briefly waited for."""
        for _ in range(_SETTLE_POLLS):
            if (state := self._state()) is not None:
                return state
            await asyncio.sleep(_SETTLE_POLL_S)
        return self._state()

    @property
    def waiting(self) -> int:
        return self._waiting.total() + sum(other.waiting for other in self._others.values())

    def close(self) -> None:
        """End the processes; waiting reads fail. Idempotent."""
        self._closed = True
        self._end()
        for other in self._others.values():
            other.close()

    async def _read(self, request: Read) -> ReadResult:
        before = self._state()
        try:
            async with asyncio.timeout(_READ_S):
                named = before is not None and isinstance(request, ReadPage)
                found = await self._exchange(structs.replace(request, state=repr(before)) if named else request)
        except BaseException as error:
            self._end()  # it may be in the middle of a reply
            if isinstance(error, TimeoutError):
                _log.error("%s: the reader took longer than %g s over %s", self._slug, _READ_S, type(request).__name__)
                raise StorageError(f"the read timed out on the server after {_READ_S:g} s") from error
            if isinstance(error, OSError | EOFError | msgspec.DecodeError):
                raise StorageError("the server's reader process of this project ended; try again") from error
            raise
        if before is not None and before == self._state():
            self._cache.keep(request, before, found)
        return found

    async def _exchange(self, request: Read) -> ReadResult:
        self._cancel_idle_timer()
        incoming, outgoing = self._stream or await self._start()
        outgoing.write(encode_frames(request))
        buffer = FrameBuffer(_MAX_FOUND_BYTES)
        while received := await incoming.read(_RECEIVE_BYTES):
            for frame in buffer.receive(received):
                found = _decoder.decode(frame)
                self._start_idle_timer()
                return found
        raise EOFError

    async def _start(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._require_open()
        self._process, connection = await self._start_child(_COMMAND, self._paths.root, self._slug)
        try:
            self._require_open()  # it may have been closed since
            self._stream = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        return self._stream

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError("the server is stopping")

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the process while idle: it has the lists that an open page reads again after each change."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1

    def _start_idle_timer(self) -> None:
        self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._end_if_unused)

    def _end_if_unused(self) -> None:
        if self._holders:
            self._start_idle_timer()
        else:
            self._end()

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()

    def _end(self) -> None:
        self._cancel_idle_timer()
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None
        if self._process is not None:
            self._process.end()
            self._process = None


def _reserve(found: ReadResult, share: ResponseShare | None) -> ReadResult:
    if share is not None:
        share.hold(found.body)
    return found


def _kind_of(request: Read) -> str:
    """Return the kind of a slow read; "" for another."""
    if isinstance(request, ReadCommand):
        return "command"
    name = request.path.partition("?")[0].removeprefix("/api/").partition("/")[0]
    return name if name in _ALL_TASKS else ""
