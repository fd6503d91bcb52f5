"""The reader process of a project, seen from the server: started when it is needed, ended when it is not, or stuck.

Reads are carried out one at a time, tokens in turn. What was read while the worker had nothing to do is the tree at the
head, and serves everybody who asks for the same before the next change.

A read that overlaps a transaction counts only if that is committed and durable (I2): until then its answer waits, and
where the transaction was rolled back, the read is repeated.
"""

import asyncio
import contextlib
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from lattice_remote.errors import Rejected, StorageError
from lattice_remote.server.datadir import ProjectPaths
from lattice_remote.server.ipc import FrameBuffer, Read, ReadCommand, ReadResult, TreeState, encode_frames, start_child
from lattice_remote.server.project.queue import FairLock
from lattice_remote.server.transport.response_budget import ResponseShare

__all__ = ["ReadCache", "ReaderProcess"]

_KEPT_S = 5.0
"""How long an answer may be given again: some say how long ago something was."""
_MAX_BYTES = 32 * 1024 * 1024
_OVERHEAD_BYTES = 1024
"""What each takes beside its contents: there may be many that say next to nothing."""

_ITEM_BYTES = 160
"""What is known of each item of a list."""


class ReadCache:
    """The newest answers of one state of the tree. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._state: object | None = None
        self._answers: dict[Read, tuple[float, ReadResult]] = {}  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, asked: Read, state: object | None) -> ReadResult | None:
        """Return what was found in this state, None when that is not known; a state of None is none."""
        since, found = self._answers.get(asked, (0.0, None))
        is_fresh = state is not None and state == self._state and _now() - since < _KEPT_S
        return found if is_fresh else None

    def keep(self, asked: Read, state: object, found: ReadResult) -> None:
        """Keep an answer, and drop those of another state, the old ones, and as many as there is no room for."""
        if state != self._state:
            self._answers.clear()
            self._bytes, self._state = 0, state
        self._drop(asked)
        self._answers[asked] = _now(), found
        self._bytes += _weight_of(asked, found)
        while len(self) > 1 and (self._bytes > _MAX_BYTES or _now() - self._oldest[1] >= _KEPT_S):
            self._drop(self._oldest[0])

    @property
    def _oldest(self) -> tuple[Read, float]:
        asked, (since, _) = next(iter(self._answers.items()))
        return asked, since

    def _drop(self, asked: Read) -> None:
        if (kept := self._answers.pop(asked, None)) is not None:
            self._bytes -= _weight_of(asked, kept[1])


def _now() -> float:
    return asyncio.get_running_loop().time()


def _weight_of(asked: Read, found: ReadResult) -> int:
    said = sum(map(len, asked.argv)) if isinstance(asked, ReadCommand) else len(asked.path)
    items = 0 if found.items is None else len(found.items.ids) * _ITEM_BYTES
    return _OVERHEAD_BYTES + said + len(found.body) + len(found.message) + items


_COMMAND = (sys.executable, "-P", "-X", "utf8", "-m", "lattice_remote.server.worker.reader")
_READ_S = 20.0
"""A read that takes longer is given up, and its process ended."""
_IDLE_S = 300.0
"""A process that was asked nothing for so long is ended."""
_MAX_WAITING = 256
"""Reads of one token that may wait."""
_RECEIVE_BYTES = 1 << 20
_MAX_FOUND_BYTES = 256 * 1024 * 1024

_TRIES_TO_COMMIT = 10
"""A transaction that is rolled back after it has changed files is rare: ten in a row are no accident."""
_COMMIT_S, _COMMIT_LOOK_S = 10.0, 0.001
"""How long a read waits for a transaction that it overlaps, and how often it looks."""
_TRIES_TOGETHER = 4
_SETTLE_LOOKS, _SETTLE_LOOK_S = 25, 0.002

_decoder = msgspec.msgpack.Decoder(ReadResult)
_log = logging.getLogger(__name__)


class ReaderProcess:
    """See the module's text. ``close()`` it at the end. Belongs to the event loop's thread.

    Args:
        slug: the project's.
        paths: its files.
        state: returns what names the state of its tree, and None while that is about to change. Between two moments
            with the same name nothing has touched the tree.
        durable: returns the epoch, and the number of its newest durable change.
    """

    def __init__(
        self,
        slug: str,
        paths: ProjectPaths,
        state: Callable[[], object | None],
        durable: Callable[[], tuple[str, int]],
    ) -> None:
        self._slug = slug
        self._paths = paths
        self._state = state
        self._durable = durable
        self._lock = FairLock()
        self._waiting: Counter[str] = Counter()  # by token
        self._kept = ReadCache()
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._closed = False

    async def read(self, asked: Read, share: ResponseShare | None = None) -> ReadResult:
        """Return what a read finds; it sees every change that was acknowledged before this is called.

        Args:
            share: of whose response it is to be a part: its token's reads wait for their turn, and for room. None for
                the server's own.

        Raises:
            Rejected: REMOTE_BUSY, too many of the token wait, it has too many answers outstanding, or no state of
                the files was committed for a long time.
            StorageError: the process can't be started, or took too long over it.
        """
        kept = self._kept.get(asked, self._state())
        if kept is not None and (share is None or share.may_hold(kept.body)):
            return _held(kept, share)
        token_id = share.token_id if share is not None else ""
        if self._waiting[token_id] >= _MAX_WAITING:
            raise Rejected(f"{_MAX_WAITING} reads of this token wait in this project; try again", code="REMOTE_BUSY")
        self._waiting[token_id] += 1
        try:
            for _ in range(_TRIES_TO_COMMIT):
                found, before, epoch = await self._read_in_turn(asked, token_id, share)
                if await self._is_committed(before, epoch):
                    return found
                if share is not None:
                    share.drop(found.body)
        finally:
            self._waiting[token_id] -= 1
            if not self._waiting[token_id]:
                del self._waiting[token_id]
        raise Rejected("what was read was undone again and again; try again", code="REMOTE_BUSY")

    def _tree_state(self) -> TreeState:
        return TreeState.read(self._paths.journal)

    async def _is_committed(self, before: TreeState, epoch: str) -> bool:
        """Wait until all that a read may have seen is durable; return whether nothing of it was rolled back.

        Raises:
            Rejected: REMOTE_BUSY, that takes too long.
        """
        seen = now = self._tree_state()
        try:
            async with asyncio.timeout(_COMMIT_S):
                while now.is_open and now.ended == seen.ended:
                    await asyncio.sleep(_COMMIT_LOOK_S)  # another process ends it: no event tells of that
                    now = self._tree_state()
                while now.rolled_back == before.rolled_back and self._is_ahead(epoch, now.seq):  # noqa: ASYNC110 - one fsync
                    await asyncio.sleep(_COMMIT_LOOK_S)
        except TimeoutError:
            raise Rejected("a write has taken too long to wait for; try again", code="REMOTE_BUSY") from None
        return now.rolled_back == before.rolled_back and self._durable()[0] == epoch

    def _is_ahead(self, epoch: str, seq: int) -> bool:
        """Tell whether a change of this epoch is not durable yet."""
        current, head = self._durable()
        return current == epoch and head < seq

    async def _read_in_turn(
        self, asked: Read, token_id: str, share: ResponseShare | None
    ) -> tuple[ReadResult, TreeState, str]:
        """Return what a read finds, the state of the tree before it, and the epoch."""
        while True:
            if share is not None:
                await share.room()
            async with self._lock.turn(token_id):
                if share is None or share.has_room:  # another answer to its token may have taken the room meanwhile
                    before, (epoch, _) = self._tree_state(), self._durable()
                    found = self._kept.get(asked, self._state()) or await self._read(asked)
                    return _held(found, share), before, epoch

    async def read_together(
        self, asked: Sequence[Read], share: ResponseShare | None = None
    ) -> tuple[list[ReadResult], bool]:
        """Return what several reads find, and whether all of them found it in the state in which the tree is now.

        Where writes follow one on the other it may be that of none: then each read has seen what was acknowledged
        before this was called. Otherwise as ``read``.
        """
        for _ in range(_TRIES_TOGETHER):
            if share is not None:
                share.close()  # what the try before has found is not sent
            before = await self._settled()
            found = [await self.read(each, share) for each in asked]
            if before is not None and before == self._state():
                return found, True
        return found, False

    async def _settled(self) -> object | None:
        """Return the state of the tree; wait a moment for one."""
        for _ in range(_SETTLE_LOOKS):
            if (state := self._state()) is not None:
                return state
            await asyncio.sleep(_SETTLE_LOOK_S)
        return self._state()

    @property
    def waiting(self) -> int:
        """How many reads are asked for and not answered, the one that is carried out included."""
        return self._waiting.total()

    def close(self) -> None:
        """End the process; reads that wait for it fail. Idempotent."""
        self._closed = True
        self._end()

    async def _read(self, asked: Read) -> ReadResult:
        before = self._state()
        try:
            async with asyncio.timeout(_READ_S):
                found = await self._exchange(asked)
        except BaseException as error:
            self._end()  # it may be half way through an answer
            if isinstance(error, TimeoutError):
                _log.error("%s: the reader took longer than %g s over %s", self._slug, _READ_S, type(asked).__name__)
                raise StorageError(f"reading this took longer than {_READ_S:g} s on the server") from error
            if isinstance(error, OSError | EOFError | msgspec.DecodeError):
                raise StorageError("the server's reader of this project ended; try again") from error
            raise
        if before is not None and before == self._state():
            self._kept.keep(asked, before, found)
        return found

    async def _exchange(self, asked: Read) -> ReadResult:
        self._stay()
        incoming, outgoing = self._stream or await self._start()
        outgoing.write(encode_frames(asked))
        buffer = FrameBuffer(_MAX_FOUND_BYTES)
        while received := await incoming.read(_RECEIVE_BYTES):
            for frame in buffer.receive(received):
                found = _decoder.decode(frame)
                self._leaving = asyncio.get_running_loop().call_later(_IDLE_S, self._end)
                return found
        raise EOFError

    async def _start(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._closed:
            raise StorageError("the server is stopping")
        self._process, connection = start_child(_COMMAND, self._paths.root, self._slug)
        try:
            self._stream = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        return self._stream

    def _stay(self) -> None:
        """It is needed: don't end it for being idle."""
        if self._leaving is not None:
            self._leaving.cancel()

    def _end(self) -> None:
        self._stay()
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()  # it was killed: this takes no time
            self._process = None


def _held(found: ReadResult, share: ResponseShare | None) -> ReadResult:
    """Count what was found for the response that it is for, and return it."""
    if share is not None:
        share.hold(found.body)
    return found
