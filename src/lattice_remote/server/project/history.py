"""A project's history as its followers see it: the head, the tree at the head, and the changes up to it.

Everything here is durable (I2). A change is told to all followers in the moment in which it becomes the head, so
whoever looks at the head, the files or the manifest and queues what it saw, without waiting between, is right.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Hashable
from itertools import islice
from pathlib import Path
from typing import Protocol

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.protocol.bundle import first_sign_of_use
from lattice_remote.protocol.codec import encode
from lattice_remote.protocol.effects import Position
from lattice_remote.protocol.messages import Bye, Change, Entries, Entry
from lattice_remote.server.ipc import PathState, Ready
from lattice_remote.server.journal.reader import JournalReader
from lattice_remote.server.journal.segment import ChangeIds
from lattice_remote.server.transport.send_queue import websocket_frame

__all__ = ["CommitTimes", "Content", "History", "Recent", "Subscriber"]


class Recent:
    """A bounded run of consecutive changes, up to the project's head. The newest is always kept."""

    def __init__(self, max_bytes: int = 8 * 1024 * 1024) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._changes: deque[tuple[int, bytes, bytes]] = deque()  # number, mark, frame

    def append(self, seq: int, mark: bytes, frame: bytes) -> None:
        """Keep change ``seq``, the one after the last."""
        assert not self._changes or self._changes[-1][0] == seq - 1, "numbers have no gap (I1)"
        self._changes.append((seq, mark, frame))
        self._bytes += len(frame)
        while self._bytes > self._max_bytes and len(self._changes) > 1:
            self._bytes -= len(self._changes.popleft()[2])

    def clear(self) -> None:
        """Forget everything: another history begins."""
        self._changes.clear()
        self._bytes = 0

    def after(self, seq: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return numbers and frames of the changes after ``seq``, of about ``max_bytes``; empty when not kept."""
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
        """Return the mark of change ``seq``, None when it is not kept."""
        index = self._index(seq)
        return None if index is None else self._changes[index][1]

    def _index(self, seq: int) -> int | None:
        if not self._changes or not self._changes[0][0] <= seq <= self._changes[-1][0]:
            return None
        return seq - self._changes[0][0]


_ENTRIES_PER_FRAME = 1000
_REPLAY_BYTES = 1024 * 1024
_MAX_FORMER = 1000

Content = tuple[int, bytes]
"""A file's size in bytes and its digest."""


class Subscriber(Protocol):
    """A connected client, as its project sees it. No call waits or raises."""

    @property
    def lane(self) -> Hashable:
        """Requests of one lane keep their order, and lanes take turns; a connection's own, or one for several."""

    def change_committed(self, seq: int, frame: bytes) -> None:
        """Change ``seq`` is durable; ``frame`` is ready for the wire and shared."""

    def answer(self, request_id: str, reply: bytes) -> None:
        """A request is answered with this encoded frame."""

    def end(self, bye: Bye) -> None:
        """Say goodbye and close."""


class History:
    """See the module's text. All methods belong to the event loop's thread."""

    def __init__(self, journal: Path, committed: Callable[[int], None] = lambda _: None) -> None:
        """``committed`` is called with the number of each change, as the followers are."""
        self.epoch = ""
        """Its name; "" before the worker was ready for the first time."""
        self.head = 0
        """The number of the last change that followers were told of."""
        self.mark = b""
        """The mark of the state at ``head``."""
        self.oldest = 0
        """The first change that can still be replayed."""
        self.files: dict[str, Content] = {}
        """The tree at ``head``."""
        self._journal = JournalReader(journal)
        self._change_ids = ChangeIds(journal)
        self._committed = committed
        self._reading = asyncio.Lock()  # one at a time: each takes a segment's memory while it lasts
        self._recent = Recent()
        self._was_at: dict[Position, bool] = {}  # by position in a former epoch: clients come back together
        self._entries: tuple[int, list[bytes]] | None = None  # the manifest's frames at a head
        self._expected: dict[tuple[str, Content], list[Callable[[], None]]] = {}
        self._followers: set[Subscriber] = set()

    @property
    def used(self) -> str | None:
        """What shows that something was done in the project, in words; None when it is empty, as its files say."""
        return first_sign_of_use((path, size) for path, (size, _) in self.files.items())

    @property
    def position(self) -> Position:
        """The head, with the mark of its change."""
        return Position(self.epoch, self.head, self.mark)

    # --- what followers need ---

    def join(self, follower: Subscriber) -> None:
        """Tell this follower of everything from the next change on."""
        self._followers.add(follower)

    def leave(self, follower: Subscriber) -> None:
        """Forget a follower. Idempotent."""
        self._followers.discard(follower)

    async def changes_after(self, seq: int) -> list[tuple[int, bytes]]:
        """Return numbers and frames of changes after ``seq``, in order: a batch, empty when they are not kept.

        Raises:
            OSError: the journal can't be read.
        """
        batch = self._recent.after(seq, _REPLAY_BYTES)
        if batch or seq >= self.head:
            return batch
        async with self._reading:
            kept = await asyncio.to_thread(self._journal.read, seq, self.head, 4 * _REPLAY_BYTES)
            return [(number, websocket_frame(change)) for number, change in kept or ()]

    async def mark_at(self, seq: int) -> bytes | None:
        """Return the mark of the state at ``seq``, None when it is not known any more.

        Raises:
            OSError: the journal can't be read.
        """
        if seq in (0, self.head):
            return self.mark if seq else b""
        known = self._recent.mark_at(seq)
        return known if known is not None else await asyncio.to_thread(self._journal.mark_at, seq)

    async def is_genuine(self, position: Position) -> bool:
        """Tell whether the project, or another copy of it, has made this position's mark.

        Raises:
            OSError: the journal's key can't be read.
        """
        return await asyncio.to_thread(self._change_ids.is_genuine, position.epoch, position.seq, position.mark)

    async def lacks(self, position: Position) -> bool:
        """Tell whether the project has no record of a position, so that changes up to it may be lost here.

        Raises:
            OSError: the journal can't be read.
        """
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
        """Return the manifest at ``head`` as frames, shared by all who ask before the next change."""
        if self._entries is None or self._entries[0] != self.head:
            self._entries = (self.head, self._make_entries())
        return self._entries[1]

    def _make_entries(self) -> list[bytes]:
        entries = [Entry(path, size, digest) for path, (size, digest) in self.files.items()]
        pieces = [entries[i : i + _ENTRIES_PER_FRAME] for i in range(0, len(entries), _ENTRIES_PER_FRAME)] or [[]]
        return [websocket_frame(encode(Entries(self.head, self.mark, piece, piece is pieces[-1]))) for piece in pieces]

    def expect(self, path: str, content: Content, call: Callable[[], None]) -> Callable[[], None]:
        """Call ``call()`` in the very moment in which a change has made the file this content.

        That is after followers were told of the change and before they are told of the next. Returns what takes
        the wish back.
        """
        calls = self._expected.setdefault((path, content), [])
        calls.append(call)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                calls.remove(call)
            if not calls and self._expected.get((path, content)) is calls:
                del self._expected[path, content]

        return forget

    # --- what the worker has made durable ---

    def publish(self, seq: int, mark: bytes, change: bytes, after: list[PathState], *, oldest: int) -> None:
        """Tell every follower of a durable change (I2); ``after`` are its files, ``oldest`` 0 when not known."""
        assert seq == self.head + 1, f"{seq} follows {self.head}: a gap (I1)"
        frame = websocket_frame(change)
        self.head, self.mark = seq, mark
        self.oldest = oldest or self.oldest or seq
        for file in after:
            if file.digest is None:
                self.files.pop(file.path, None)
            else:
                self.files[file.path] = (file.size, file.digest)
        self._recent.append(seq, mark, frame)
        self._committed(seq)
        for follower in tuple(self._followers):
            follower.change_committed(seq, frame)
        for file in after if self._expected else ():
            if file.digest is not None:
                for call in self._expected.pop((file.path, (file.size, file.digest)), ()):
                    call()

    async def resume(self, ready: Ready) -> None:
        """Go on with a new worker: tell the followers what they missed, or that another history begins.

        Raises:
            StorageError: what they missed is not in the journal.
            OSError: the journal can't be read.
        """
        if self.epoch == ready.epoch and self.head <= ready.head:
            await self._publish_missed(ready)
            self._take(ready)
        else:
            self.begin(ready, "the project's history begins anew; come back at once")

    def begin(self, ready: Ready, reason: str) -> None:
        """Begin another history, and send everybody away; when they are back they resync (I7)."""
        self._recent.clear()
        self._expected.clear()
        self.dismiss(Bye("REMOTE_BUSY", reason, 0.0))
        self._take(ready)

    def dismiss(self, bye: Bye) -> None:
        """Say goodbye to every follower."""
        for follower in tuple(self._followers):
            follower.end(bye)

    async def _publish_missed(self, ready: Ready) -> None:
        """Tell the followers what the last worker made durable and had no time to report.

        The files after it are in ``ready``: the caller takes them in the same tick.
        """
        missed: list[tuple[int, bytes]] = []
        while self.head + len(missed) < ready.head:
            batch = await asyncio.to_thread(self._journal.read, self.head + len(missed), ready.head, 64 * _REPLAY_BYTES)
            if not batch:
                raise StorageError(f"change {self.head + len(missed) + 1} is not in the journal")
            missed += batch
        for seq, change in missed:
            mark = msgspec.msgpack.decode(change, type=Change).mark
            self.publish(seq, mark, change, [], oldest=0)

    def _take(self, ready: Ready) -> None:
        self.epoch, self.head, self.mark = ready.epoch, ready.head, ready.mark
        self.oldest = ready.oldest
        self.files = {file.path: (file.size, file.digest) for file in ready.files if file.digest is not None}
        self._entries = None


_MINUTE_S = 60.0


class CommitTimes:
    """The times of the newest changes, at most ``most`` of them."""

    def __init__(self, most: int = 20_000) -> None:
        self._times: deque[float] = deque(maxlen=most)
        self._last = 0

    def committed(self, seq: int, now: float) -> None:
        """Change ``seq`` is durable and told to everybody. Another than the next begins anew."""
        if seq != self._last + 1:
            self._times.clear()
        self._times.append(now)
        self._last = seq

    def age_of(self, seq: int, now: float) -> float | None:
        """Return how long ago a change was committed; None when that is not known here."""
        back = self._last - seq
        return now - self._times[-1 - back] if 0 <= back < len(self._times) else None

    def per_minute(self, now: float) -> int:
        """Return how many changes were committed within the last minute; from what is known where that is less."""
        times = self._times
        if len(times) == times.maxlen and now - times[0] < _MINUTE_S:
            return round(len(times) * _MINUTE_S / max(now - times[0], 1.0))
        count = 0
        for time in reversed(times):
            if now - time >= _MINUTE_S:
                break
            count += 1
        return count
