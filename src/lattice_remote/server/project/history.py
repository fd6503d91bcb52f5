"""Durable history of a project: head, files at the head, recent changes and the subscribers.

Everything here is durable (I2). Each change reaches all subscribers in the tick in which it becomes the head: code that
reads head, files or manifest and queues the result without yielding is consistent.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, MutableMapping
from itertools import batched, islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.protocol.bundle import first_sign_of_use
from lattice_remote.protocol.file_table import contents_by_path
from lattice_remote.protocol.messages import Bye, Change, Entries, Entry, Position, encode
from lattice_remote.server.ipc import PathState, Ready
from lattice_remote.server.journal.ids import ChangeIds
from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.transport.websocket import websocket_frame

__all__ = ["REPLAY_BYTES", "CommitTimes", "Content", "History", "Recent", "Start", "Subscriber"]


class Recent:
    """Consecutive changes up to the head, bounded, at least the newest."""

    def __init__(self, max_bytes: int = 8 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._changes: deque[tuple[int, bytes, bytes]] = deque()  # number, mark, frame

    def append(self, seq: int, mark: bytes, frame: bytes) -> None:
        assert not self._changes or self._changes[-1][0] == seq - 1, "numbers have no gap (I1)"
        self._changes.append((seq, mark, frame))
        self._bytes += len(frame)
        while self._bytes > self._max_bytes and len(self._changes) > 1:
            self._bytes -= len(self._changes.popleft()[2])

    def clear(self) -> None:
        self._changes.clear()
        self._bytes = 0

    def after(self, seq: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return about ``max_bytes`` of changes; empty when not kept."""
        index = self._index(seq + 1)
        found: list[tuple[int, bytes]] = []
        if index is None:
            return found
        for number, _, frame in islice(self._changes, index, None):
            found.append((number, frame))
            max_bytes -= len(frame)
            if max_bytes <= 0:
                break
        return found

    def mark_at(self, seq: int) -> bytes | None:
        index = self._index(seq)
        return None if index is None else self._changes[index][1]

    def _index(self, seq: int) -> int | None:
        if not self._changes or not self._changes[0][0] <= seq <= self._changes[-1][0]:
            return None
        return seq - self._changes[0][0]


_ENTRIES_PER_FRAME = 1000
REPLAY_BYTES = 1024 * 1024
"""About, for a batch of changes."""
_MAX_FORMER = 1000

Content = tuple[int, bytes]


class Start(NamedTuple):
    outcome: Literal["kept", "expired", "ahead", "epoch"]
    """``kept``: they can be sent. Otherwise they have expired, the position is ahead of the head, or the position is
    not in the present history."""
    position: Position


class Subscriber(Protocol):
    def change_committed(self, seq: int, frame: bytes) -> None: ...

    def end(self, bye: Bye) -> None: ...


class History:
    """Head, files and recent changes of a project. Belongs to the event loop's thread."""

    def __init__(self, journal: Path, committed: Callable[[int], None] = lambda _: None) -> None:
        self.epoch = ""
        self.head = 0
        self.mark = b""
        self.oldest = 0
        """First change that can be replayed."""
        self.files: MutableMapping[str, Content] = {}
        self._journal = JournalReader(journal)
        self._change_ids = ChangeIds(journal)
        self._committed = committed
        self._reading = asyncio.Lock()  # one read at a time: each holds a segment in memory
        self._recent = Recent()
        self._was_at: dict[Position, bool] = {}  # by position in a former epoch: clients reconnect together
        self._entries: list[bytes] | None = None  # the manifest's frames at the head
        self._used: tuple[int, str | None] | None = None  # at a head
        self._expected: dict[tuple[str, Content], list[Callable[[], None]]] = {}
        self._subscribers: set[Subscriber] = set()

    @property
    def used(self) -> str | None:
        return first_sign_of_use((path, size) for path, (size, _) in self.files.items())

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.head, self.mark)

    def join(self, subscriber: Subscriber) -> None:
        self._subscribers.add(subscriber)

    def leave(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)

    async def changes_after(self, seq: int) -> list[tuple[int, bytes]]:
        """Return a batch of the changes after ``seq``; empty when not kept. Raises OSError."""
        batch = self._recent.after(seq, REPLAY_BYTES)
        if batch or seq >= self.head:
            return batch
        async with self._reading:
            stored = await asyncio.to_thread(self._journal.read, seq, self.head, 4 * REPLAY_BYTES)
            return [(number, websocket_frame(change)) for number, change in stored or ()]

    async def mark_at(self, seq: int) -> bytes | None:
        """Return a change id; None when no longer known. Raises OSError."""
        if seq in (0, self.head):
            return self.mark if seq else b""
        known = self._recent.mark_at(seq)
        return known if known is not None else await asyncio.to_thread(self._journal.mark_at, seq)

    async def is_genuine(self, position: Position) -> bool:
        """Return whether this project, or a copy of it, made this change id. Raises OSError."""
        return await asyncio.to_thread(self._change_ids.is_genuine, position.epoch, position.seq, position.mark)

    async def lacks(self, position: Position) -> bool:
        """Return whether the project has no record of a position: its changes may be lost here. Raises OSError."""
        if not position.epoch:
            return False
        if (known := self._was_at.get(position)) is None:
            async with self._reading:
                known = await asyncio.to_thread(self._journal.was_at, position.epoch, position.seq, position.mark)
            if len(self._was_at) >= _MAX_FORMER:
                self._was_at.clear()
            if position.epoch != self.epoch:
                self._was_at[position] = known
        return not known

    def entries(self) -> list[bytes]:
        if self._entries is None:
            entries = (Entry(path, size, digest) for path, (size, digest) in self.files.items())
            left, frames = len(self.files), []
            for piece in batched(entries, _ENTRIES_PER_FRAME) if left else ((),):
                left -= len(piece)
                frames.append(websocket_frame(encode(Entries(self.head, self.mark, list(piece), left == 0))))
            self._entries = frames
        return self._entries

    def expect(self, path: str, content: Content, call: Callable[[], None]) -> Callable[[], None]:
        """Call ``call()`` in the tick in which a change gives the file this content; return a function that cancels it.

        Subscribers have got that change then, and not the next.
        """
        calls = self._expected.setdefault((path, content), [])
        calls.append(call)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                calls.remove(call)
            if not calls and self._expected.get((path, content)) is calls:
                del self._expected[path, content]

        return forget

    def publish(self, seq: int, mark: bytes, change: bytes, after: list[PathState], *, oldest: int) -> None:
        """Send a durable change to every subscriber (I2); ``oldest`` is 0 when unknown."""
        assert seq == self.head + 1, f"{seq} follows {self.head}: a gap (I1)"
        frame = websocket_frame(change)
        self.head, self.mark, self._entries = seq, mark, None
        self.oldest = oldest or self.oldest or seq
        for file in after:
            if file.digest is None:
                self.files.pop(file.path, None)
            else:
                self.files[file.path] = (file.size, file.digest)
        self._recent.append(seq, mark, frame)
        self._committed(seq)
        for subscriber in tuple(self._subscribers):
            subscriber.change_committed(seq, frame)
        for file in after if self._expected else ():
            if file.digest is not None:
                for call in self._expected.pop((file.path, (file.size, file.digest)), ()):
                    call()

    async def resume(self, ready: Ready) -> None:
        """Continue with a new worker: publish missed changes, or switch to its history.

        Raises StorageError if the journal lacks a missed change, or OSError.
        """
        if self.epoch == ready.epoch and self.head <= ready.head:
            await self._publish_missed(ready)
            self._take(ready)
        else:
            self.begin(ready, "the project has started a new history; reconnect at once")

    def begin(self, ready: Ready, reason: str) -> None:
        """Start another history and disconnect all subscribers, which resync when they reconnect (I7)."""
        self._recent.clear()
        self._expected.clear()
        self.dismiss(Bye("REMOTE_BUSY", reason, 0.0))
        self._take(ready)

    def dismiss(self, bye: Bye) -> None:
        for subscriber in tuple(self._subscribers):
            subscriber.end(bye)

    async def _publish_missed(self, ready: Ready) -> None:
        """Publish the changes that the last worker made durable but did not report.

        The caller must adopt the files in ``ready`` in the same tick.
        """
        missed: list[tuple[int, bytes]] = []
        while self.head + len(missed) < ready.head:
            batch = await asyncio.to_thread(self._journal.read, self.head + len(missed), ready.head, 64 * REPLAY_BYTES)
            if not batch:
                raise StorageError(f"change {self.head + len(missed) + 1} is not in the journal")
            missed += batch
        for seq, change in missed:
            mark = msgspec.msgpack.decode(change, type=Change).mark
            self.publish(seq, mark, change, [], oldest=0)

    def _take(self, ready: Ready) -> None:
        self.epoch, self.head, self.mark = ready.epoch, ready.head, ready.mark
        self.oldest = ready.oldest
        contents = ((file.path, (file.size, file.digest)) for file in ready.files if file.digest is not None)
        self.files = contents_by_path(contents, len(ready.files))
        self._entries = self._used = None


_MINUTE_S = 60.0


class CommitTimes:
    def __init__(self, most: int = 20_000) -> None:
        self._times: deque[float] = deque(maxlen=most)
        self._last = 0

    def committed(self, seq: int, now: float) -> None:
        if seq != self._last + 1:
            self._times.clear()
        self._times.append(now)
        self._last = seq

    def age_of(self, seq: int, now: float) -> float | None:
        back = self._last - seq
        return now - self._times[-1 - back] if 0 <= back < len(self._times) else None

    def per_minute(self, now: float) -> int:
        times = self._times
        if len(times) == times.maxlen and now - times[0] < _MINUTE_S:
            return round(len(times) * _MINUTE_S / max(now - times[0], 1.0))
        count = 0
        for time in reversed(times):
            if now - time >= _MINUTE_S:
                break
            count += 1
        return count
