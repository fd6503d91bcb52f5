"""Journal: a project's numbered changes and the replies to its requests, durable and bounded (I1, I2, I6).

``journal/`` holds segments, see ``segment.py``. A record without a change keeps a reply, for a retry.

A new epoch is a new segment. The segments before it, and those before a damaged one, are *former*: not replayed, but
shown by the audit log until they expire. ``ids.py`` holds the ids of former and expired segments.

The worker appends with ``write()``, which survives a kill. The committer makes it durable: one fsync for all waiting
records, before anything that depends on them is sent (I2).
"""

import contextlib
import errno
import logging
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from lattice_remote.files import HEAD_BYTES, frame, frames, payload_at, write_all
from lattice_remote.server.ipc import RequestDone, ToServer, WorkerFailed, encode_frames
from lattice_remote.server.journal.ids import ChangeIds, RequestIds
from lattice_remote.server.journal.segment import (
    Outline,
    Record,
    Segment,
    StoredSegment,
    decoder,
    outline_decoder,
    read_segment,
    readable_records,
    salvaged,
    segment_paths,
)
from lattice_remote.server.tree.tree import FileState, SyncFailed, sync, sync_directory, sync_files

__all__ = ["CommitJob", "Committer", "Journal", "Retention", "encode_record"]


_log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_SCRATCH = ".new"


def encode_record(record: Record) -> bytes:
    return _encoder.encode(record)


@dataclass(frozen=True)
class Retention:
    """Bounds of the history, in whole segments; the newest segment always stays.

    At most ``max_bytes`` and one segment are on disk; a segment has ``segment_bytes`` and its last record. Records
    older than ``max_age_s`` are removed at most an eighth of that time later, also if nothing is written.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_age_s: float = 30 * 24 * 3600.0
    segment_bytes: int = 8 * 1024 * 1024

    @property
    def segment_age_s(self) -> float:
        return self.max_age_s / 8


@dataclass(frozen=True)
class _Former:
    """A segment that no longer belongs to the history, readable or not."""

    path: Path
    size: int
    newest: float


@dataclass(frozen=True, slots=True)
class _Place:
    segment: int
    offset: int


class Journal:
    """The worker's side of the journal, made by ``open`` or ``create``. Not thread-safe.

    Attributes:
        notes: repairs made by ``open``, one line each.
        is_damaged: ``open`` cut records that may have been acknowledged: their replies are lost.
        request_ids: the requests answered in expired or former segments.
    """

    def __init__(self, directory: Path, retention: Retention) -> None:
        self.directory = directory
        self.retention = retention
        self.epoch = ""
        self.head = 0
        self.mark = b""
        self.notes: list[str] = []
        self.is_damaged = False
        self.change_ids = ChangeIds(directory)
        self.request_ids = RequestIds(directory, retention.max_age_s)
        self._next_number = 0
        self._former: list[_Former] = []
        self._segments: list[StoredSegment] = []
        self._places: dict[bytes, _Place] = {}
        self._retired: list[Outline] = []  # records of former segments that may be missing in the index
        self._descriptor = -1

    @classmethod
    def open(cls, directory: Path, retention: Retention | None = None) -> Self | None:
        """Open the journal, cut a torn tail, and fsync the rest: its writer may have died before that (I2).

        Returns None if there is no readable journal: then ``create`` one (I7). Raises OSError.
        """
        journal = cls(directory, retention or Retention())
        journal._load()
        journal._index_retired()
        if not journal._segments:
            return None
        journal._cut_tail()
        journal._index_retired()
        journal._sync()
        return journal

    @classmethod
    def create(
        cls,
        directory: Path,
        epoch: str,
        retention: Retention | None = None,
        *,
        answered: Iterable[Record] = (),
        since: float | None = None,
    ) -> Self:
        """Start a new history: existing segments become former ones, numbers start at 0. Raises OSError.

        A crash leaves the old history or the new one with all of ``answered`` (I6).

        Args:
            answered: replies that a retry may ask for: records without a change, at number 0.
            since: ``answered`` has all replies after this time, in seconds since the epoch; None: none before now.
        """
        journal = cls(directory, retention or Retention())
        directory.mkdir(parents=True, exist_ok=True)
        for path in segment_paths(directory):
            journal._add_former(path)
            journal._retired += readable_records(path)
            # Later, however many records it has.
            journal._next_number = int(path.stem) + journal._former[-1].size // HEAD_BYTES + 1
        journal._index_retired()
        journal.epoch = epoch
        journal._begin_segment(time.time() if since is None else since, answered)
        return journal

    def _load(self) -> None:
        for path in self.directory.glob(f"*{_SCRATCH}"):
            path.unlink()  # the start of a segment was interrupted
        for path in segment_paths(self.directory):
            loaded = read_segment(path)
            if loaded is None:
                self._retire()
                self._retired += readable_records(path)
                self._add_former(path)
                self.notes.append(f"journal: {path.name} can't be read")
                continue
            header = loaded[0].header
            if self._segments and not self._continues(header):
                # The segments before cannot be reached from here: history starts with this one.
                self._retire()
                if (header.head, header.mark) != (0, b"") or header.epoch == self.epoch:
                    self.notes.append(f"journal: {path.name} does not continue the segment before it")
            self._adopt(*loaded)

    def _retire(self) -> None:
        if any(id_ not in self.request_ids for id_ in self._places):
            self._retired += [record for kept in self._segments for record in readable_records(kept.path)]
        self._former += [_Former(kept.path, kept.path.stat().st_size, kept.newest) for kept in self._segments]
        self._segments.clear()
        self._places.clear()

    def _index_retired(self) -> None:
        self.request_ids.add(self._retired, time.time())
        self._retired.clear()

    def _add_former(self, path: Path) -> None:
        status = path.stat()
        self._former.append(_Former(path, status.st_size, status.st_mtime))

    def _continues(self, header: Segment) -> bool:
        whole = self._segments[-1].size == self._segments[-1].path.stat().st_size
        return whole and (header.epoch, header.head, header.mark) == (self.epoch, self.head, self.mark)

    def _adopt(self, kept: StoredSegment, items: list[tuple[int, Outline]]) -> None:
        self.epoch, self.head, self.mark = kept.header.epoch, kept.header.head, kept.header.mark
        self._next_number = kept.header.number
        self._segments.append(kept)
        for offset, record in items:
            self._remember(record, offset)
            self.head, self.mark = record.seq, record.mark
            self._next_number += 1

    def _cut_tail(self) -> None:
        last = self._segments[-1]
        self._descriptor = os.open(last.path, os.O_WRONLY | os.O_APPEND)
        surplus = os.fstat(self._descriptor).st_size - last.size
        if surplus:
            self.notes.append(f"journal: cut {surplus} bytes of an incomplete record after change {self.head}")
            self._retired += salvaged(last.path.read_bytes()[last.size :])
            self.is_damaged = bool(self._retired)
            self._set_aside_tail(last)
            os.ftruncate(self._descriptor, last.size)

    def _set_aside_tail(self, last: StoredSegment) -> None:
        directory = self.directory.parent / "set-aside"
        with contextlib.suppress(OSError), last.path.open("rb") as file:
            directory.mkdir(mode=0o700, exist_ok=True)
            file.seek(last.size)
            (directory / f"{last.path.name}.from-{last.size}").write_bytes(file.read())

    def _sync(self) -> None:
        """Fsync every segment and its name; cheap if they are durable already."""
        sync_files(str(kept.path) for kept in self._segments)

    # --- appending ---

    def append(self, record: Record, payload: bytes | None = None) -> int:
        """Add a record and return the descriptor to fsync before the record is reported (I2).

        ``payload`` is the encoded record, if there is one already.

        Raises OSError: the journal is as before, or, rarely, the attempt to restore it failed too.
        """
        data = frame(payload or encode_record(record))
        last = self._segments[-1]
        try:
            write_all(self._descriptor, data)
        except OSError:
            os.ftruncate(self._descriptor, last.size)  # records behind a torn one would never be read
            raise
        self._remember(record, last.size)
        last.size += len(data)
        last.newest = record.time
        self.head, self.mark = record.seq, record.mark
        self._next_number += 1
        return self._descriptor

    def _remember(self, record: Record | Outline, offset: int) -> None:
        if record.id:
            self._places[bytes.fromhex(record.id)] = _Place(self._segments[-1].header.number, offset)

    def is_rotation_due(self, now: float) -> bool:
        last = self._segments[-1]
        old = self._next_number > last.header.number and now - last.header.since > self.retention.segment_age_s
        return old or last.size >= self.retention.segment_bytes

    def rotate(self) -> int:
        """Start a new segment, after the old one is durable, and return the old descriptor. Raises OSError."""
        old = self._descriptor
        sync(old)
        self._begin_segment(time.time())
        return old

    def _begin_segment(self, since: float, records: Iterable[Record] = ()) -> None:
        """Create a segment with records that have no change; it appears whole and durable, or not at all."""
        header = Segment(self.epoch, self._next_number, self.head, self.mark, since)
        path = self.directory / f"{header.number:020d}.log"
        data = bytearray(frame(_encoder.encode(header)))
        self._segments.append(StoredSegment(path, header, 0, time.time()))
        for record in records:
            self._remember(record, len(data))
            data += frame(_encoder.encode(record))
            self._next_number += 1
        scratch = path.with_suffix(_SCRATCH)
        self._descriptor = os.open(scratch, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600)
        write_all(self._descriptor, data)
        sync(self._descriptor)
        os.rename(scratch, path)
        sync_directory(self.directory)
        self._segments[-1].size = len(data)

    def expire(self, now: float) -> list[Path]:
        """Drop the segments beyond the retention and return their paths, for the caller to remove.

        Their ids are durable in the index by then (I6); without room for these nothing expires. Raises SyncFailed.
        """
        expired = self._over_retention(now)
        kept = expired[len(self._former) :]
        try:
            for segment in kept:
                self.request_ids.add(readable_records(segment.path), now)
        except SyncFailed:
            raise
        except OSError as error:
            _log.warning("the journal does not expire: its request ids cannot be indexed: %s", error)
            return []
        del self._former[: len(expired) - len(kept)], self._segments[: len(kept)]
        if kept:
            first = self._segments[0].header.number
            self._places = {id_: place for id_, place in self._places.items() if place.segment >= first}
        return [segment.path for segment in expired]

    def _over_retention(self, now: float) -> list[_Former | StoredSegment]:
        """Return the oldest segments, former ones first, that exceed the age or size."""
        segments: list[_Former | StoredSegment] = [*self._former, *self._segments]
        total = sum(segment.size for segment in segments)
        count = 0
        for segment in segments[:-1]:
            if total <= self.retention.max_bytes and now - segment.newest <= self.retention.max_age_s:
                break
            total -= segment.size
            count += 1
        return segments[:count]

    def close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    # --- asking again ---

    def states_after(self, seq: int) -> Iterator[dict[str, FileState | None]]:
        """Yield the file states that each commit after ``seq`` changed, oldest first. Raises OSError."""
        for kept in self._segments:
            for _, payload in frames(kept.path.read_bytes()):
                item = outline_decoder.decode(payload)
                if isinstance(item, Outline) and item.seq > seq:
                    yield item.files

    def answered_since(self, time_: float) -> Iterator[Record]:
        """Yield the records that answered a request after this time, in seconds since the epoch. Raises OSError."""
        for kept in self._segments:
            if kept.newest < time_:
                continue
            for _, payload in frames(kept.path.read_bytes()):
                item = decoder.decode(payload)
                if isinstance(item, Record) and item.id and item.time >= time_:
                    yield item

    @property
    def next_number(self) -> int:
        return self._next_number

    @property
    def segment(self) -> Path:
        return self._segments[-1].path

    @property
    def is_segment_new(self) -> bool:
        return self.head == self._segments[-1].header.head

    @property
    def newest(self) -> float:
        """Time of the last record (seconds since the epoch)."""
        return self._segments[-1].newest

    @property
    def oldest(self) -> int:
        """The first change that can be replayed; ``head + 1`` if there is none."""
        return self._segments[0].header.head + 1

    @property
    def since(self) -> float:
        """Time in seconds since the epoch: ``find`` knows every later reply."""
        return self._segments[0].header.since

    def find(self, request_id: str) -> Record | None:
        """Return the record that answered a request, None if it is unknown or expired.

        Raises OSError: it cannot be read, so the request is not new.
        """
        place = self._places.get(bytes.fromhex(request_id))
        if place is None:
            return None
        path = next(kept.path for kept in self._segments if kept.header.number == place.segment)
        with path.open("rb") as file:
            file.seek(place.offset)
            head = file.read(HEAD_BYTES)
            payload = payload_at(head + file.read(int.from_bytes(head[:4], "big")), 0)
        if payload is None:
            raise OSError(errno.EIO, f"the record at byte {place.offset} can't be read", str(path))
        found = decoder.decode(payload)
        assert isinstance(found, Record), "only records are remembered"
        return found


# --- group commit ---

_MAX_DELAY_S = 0.005


@dataclass(frozen=True)
class CommitJob:
    """Fsync ``descriptor``, then call ``then``, then send ``message``."""

    message: ToServer | None = None
    descriptor: int | None = None
    then: Callable[[], None] | None = None


class Committer:
    """Thread that commits jobs in order; a batch costs one fsync per journal file.

    Jobs are committed after ``flush``, or at most ``_MAX_DELAY_S`` after ``flush_soon``. When the storage fails it
    sends ``WorkerFailed`` and ends the process: later jobs are never acknowledged.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._jobs: deque[CommitJob] = deque()
        self._delays: queue.SimpleQueue[float | None] = queue.SimpleQueue()  # until the next batch; None: the last
        self._is_delayed = False
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def submit(self, job: CommitJob) -> None:
        self._jobs.append(job)

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def flush(self) -> None:
        self._delays.put(0.0)

    def flush_soon(self) -> None:
        if not self._is_delayed:
            self._is_delayed = True
            self._delays.put(_MAX_DELAY_S)

    def finish(self) -> None:
        self._delays.put(None)
        self._thread.join()

    def wait(self) -> None:
        done = threading.Event()
        self.submit(CommitJob(then=done.set))
        self.flush()
        done.wait()

    def _run(self) -> None:
        try:
            while self._run_batch():
                pass
        except Exception as error:  # noqa: BLE001 - after any error nothing may be acknowledged
            _log.exception("cannot write the journal")
            self._send([WorkerFailed(f"cannot write the journal: {error}")])
            os._exit(1)

    def _run_batch(self) -> bool:
        delay = self._delays.get()
        with contextlib.suppress(queue.Empty):
            while delay:
                delay = self._delays.get(timeout=delay)
        self._is_delayed = False  # before the jobs are taken: a later one is either taken too or asks again
        self._commit([self._jobs.popleft() for _ in range(len(self._jobs))])
        return delay is not None

    def _commit(self, jobs: list[CommitJob]) -> None:
        began = time.perf_counter()
        descriptors = dict.fromkeys(job.descriptor for job in jobs if job.descriptor is not None)
        for descriptor in descriptors:
            sync(descriptor)
        synced_s = time.perf_counter() - began if descriptors else None
        for job in jobs:
            if job.then is not None:
                job.then()
        messages = [job.message for job in jobs if job.message is not None]
        if messages:
            self._send(messages if synced_s is None else _with_sync_time(messages, synced_s))

    def _send(self, messages: list[ToServer]) -> None:
        # The server may be gone: the commits are durable, and the main thread is about to notice.
        with contextlib.suppress(OSError):
            self._connection.sendall(encode_frames(*messages))


def _with_sync_time(messages: list[ToServer], synced_s: float) -> list[ToServer]:
    for number, message in enumerate(messages):
        if isinstance(message, RequestDone):
            timed = msgspec.structs.replace(message, synced_s=synced_s)
            return [*messages[:number], timed, *messages[number + 1 :]]
    return messages
