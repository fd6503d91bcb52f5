"""Journal segments: file format, salvage of damaged ones, and a reader for other processes than the worker.

A segment, ``%020d.log`` with the number of its first record, has frames (``files.py``): a ``Segment`` with the
position of the history, then ``Record``s.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lattice_remote.files import HEAD_BYTES, frames, payload_at
from lattice_remote.server.tree.tree import FileState

__all__ = [
    "JournalReader",
    "Outline",
    "Record",
    "Segment",
    "StoredSegment",
    "cut_records",
    "decoder",
    "header_of",
    "list_beside",
    "next_number",
    "outline_decoder",
    "read_segment",
    "readable_records",
    "remove_segments",
    "salvaged",
    "segment_paths",
]


class Segment(msgspec.Struct, frozen=True, tag="segment"):
    epoch: str
    number: int
    head: int
    mark: bytes
    since: float = 0.0


class Record(msgspec.Struct, frozen=True, tag="record", omit_defaults=True):
    """One commit. ``change`` and ``reply`` are encoded frames; ``files`` are the states after it, None for gone.

    Attributes:
        id: empty if no retry may ask for the reply.
        moved: contents of files that the change only moved: a copy of a live project may have them in neither place
            (``repair.py``). Without a change, a content before a command destroys it.
        is_keyed: the id is the caller's key: a repetition does not say when it was first sent.
    """

    seq: int
    mark: bytes
    time: float
    id: str = ""
    token_id: str = ""
    change: bytes | None = None
    reply: bytes | None = None
    files: dict[str, FileState | None] = {}
    moved: dict[str, bytes] = {}
    fingerprint: bytes = b""
    is_keyed: bool = False


class Outline(msgspec.Struct, frozen=True, tag="record"):
    """A ``Record`` without its bytes, for fast reading."""

    seq: int
    mark: bytes
    time: float
    id: str = ""
    token_id: str = ""
    files: dict[str, FileState | None] = {}
    fingerprint: bytes = b""
    is_keyed: bool = False


decoder: msgspec.msgpack.Decoder[Segment | Record] = msgspec.msgpack.Decoder(Segment | Record)
"""Of any frame in a segment."""
outline_decoder: msgspec.msgpack.Decoder[Segment | Outline] = msgspec.msgpack.Decoder(Segment | Outline)
"""Without the bytes of changes and replies."""
_RECORD_TAG = b"\xa4type\xa6record"
_TAG_OFFSET = HEAD_BYTES + 1
"""After a record's head and the byte that counts its fields."""
_SEGMENT_NAME = re.compile(r"[0-9]{20}\.log")


@dataclass
class StoredSegment:
    path: Path
    header: Segment
    size: int
    newest: float


def segment_paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.log") if _SEGMENT_NAME.fullmatch(path.name))


def list_beside(segment: Path) -> Path:
    return segment.with_suffix(".files")


def remove_segments(paths: Iterable[Path]) -> None:
    """Remove segments and the manifests beside them, if there."""
    for path in paths:
        path.unlink(missing_ok=True)
        list_beside(path).unlink(missing_ok=True)


def read_segment(path: Path) -> tuple[StoredSegment, list[tuple[int, Outline]]] | None:
    """Return a segment with the offset and outline of each whole record; None if even its header is damaged."""
    header: Segment | None = None
    items: list[tuple[int, Outline]] = []
    size, newest = 0, path.stat().st_mtime
    for offset, payload in frames(path.read_bytes()):
        try:
            item = outline_decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            break
        if isinstance(item, Segment) != (header is None):
            break
        if isinstance(item, Segment):
            header = item
        else:
            items.append((offset, item))
            newest = item.time
        size = offset + HEAD_BYTES + len(payload)
    return (StoredSegment(path, header, size, newest), items) if header is not None else None


def salvaged(data: bytes) -> Iterator[Outline]:
    """Yield the whole records inside ``data``, which does not start with one."""
    at = data.find(_RECORD_TAG, _TAG_OFFSET)  # an earlier tag is of a record whose head is lost
    while at >= 0:
        if (payload := payload_at(data, at - _TAG_OFFSET)) is not None:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                item = outline_decoder.decode(payload)
                assert isinstance(item, Outline), "it has a record's tag"
                yield item
        at = data.find(_RECORD_TAG, at + 1)


def readable_records(path: Path) -> list[Outline]:
    """Return the outlines of all readable records of a segment, those behind damage too. Raises OSError."""
    found = read_segment(path)
    if found is None:
        return list(salvaged(path.read_bytes()))
    kept, items = found
    return [*(record for _, record in items), *salvaged(path.read_bytes()[kept.size :])]


def header_of(path: Path) -> Segment | None:
    """Return a segment's header, None if it is gone or damaged. Raises OSError."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            payload = payload_at(head + file.read(int.from_bytes(head[:4], "big")), 0)
    except FileNotFoundError:
        return None
    item = decoder.decode(payload) if payload is not None else None
    return item if isinstance(item, Segment) else None


def next_number(directory: Path) -> int:
    """Return the number that the next record gets; 0 without a readable journal. Raises OSError."""
    for path in reversed(segment_paths(directory)):
        if (found := read_segment(path)) is not None:
            return found[0].header.number + len(found[1])
    return 0


def cut_records(directory: Path, number: int, aside: Path) -> None:
    """Remove the records from ``number`` on, newest first; their bytes are kept in ``aside``. Repeatable after a crash.

    The journal must not be open. Raises OSError.
    """
    for path in reversed(segment_paths(directory)):
        header = header_of(path)
        if header is None or header.number >= number:
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(path, aside / path.name)
            remove_segments([path])
            continue
        data = path.read_bytes()
        offsets = [offset for offset, _ in frames(data)][1:]  # of its records
        if number - header.number < len(offsets):
            aside.mkdir(mode=0o700, parents=True, exist_ok=True)
            end = offsets[number - header.number]
            (aside / f"{path.name}.from-{end}").write_bytes(data[end:])
            os.truncate(path, end)
        return


def _shared_in(header: Segment, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and encoding of a segment's records, without the contents kept before a command."""
    for at, (_, payload) in enumerate(frames(path.read_bytes()), header.number - 1):
        if at >= header.number:
            item = outline_decoder.decode(payload)
            if isinstance(item, Outline) and (item.id or item.files):
                yield at, payload


class JournalReader:
    """Reader of the journal, shared by subscribers. Blocking: call it from a thread. Raises OSError.

    It may see records that are not durable yet: ask only up to a number that the worker has reported (I2).
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, after: int, upto: int, max_bytes: int) -> list[tuple[int, bytes]] | None:
        """Return (number, encoded ``Change``) for ``after < number <= upto``, in order, without a gap.

        None if change ``after + 1`` has expired: the client must resync.
        """
        changes: list[tuple[int, bytes]] = []
        total = 0
        for item in self._items(after):
            if isinstance(item, Record) and item.change is not None and after < item.seq <= upto:
                if item.seq != after + 1:
                    return changes or None
                changes.append((item.seq, item.change))
                after, total = item.seq, total + len(item.change)
                if total >= max_bytes:
                    break
            if isinstance(item, Record) and item.seq > upto:
                break
        return changes if changes or after >= upto else None

    def reaches(self, number: int) -> bool:
        """Return whether the records from ``number`` on are all here, or it is the next one."""
        headers = [header for path in segment_paths(self._directory) if (header := header_of(path))]
        first = next((header.number for header in headers if header.epoch == headers[-1].epoch), None)
        return first is not None and first <= number <= next_number(self._directory)

    def payloads(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Yield number and encoding of each record of the history from ``number`` on, without the contents kept before
        a command: those are this journal's alone. Nothing if ``number`` has expired.
        """
        segments = self._of_epoch()
        if segments and number >= segments[0][0].number:
            for header, path in segments:
                yield from ((at, payload) for at, payload in _shared_in(header, path) if at >= number)

    def payloads_before(self, number: int, count: int) -> list[bytes] | None:
        """Return the last ``count`` encodings before record ``number``, as ``payloads`` does; None if some expired."""
        found: list[bytes] = []
        for header, path in reversed(self._of_epoch()):
            if len(found) < count:
                found = [payload for at, payload in _shared_in(header, path) if at < number] + found
        return found[len(found) - count :] if len(found) >= count else None

    def _of_epoch(self) -> list[tuple[Segment, Path]]:
        """Return the segments of the newest epoch."""
        segments = [(header, path) for path in segment_paths(self._directory) if (header := header_of(path))]
        return [(header, path) for header, path in segments if header.epoch == segments[-1][0].epoch]

    def records(self) -> Iterator[Record]:
        return (item for item in self._items(0) if isinstance(item, Record))

    def mark_at(self, seq: int) -> bytes | None:
        """Return the change id of change ``seq``, or of the state before the first kept one."""
        for item in self._items(seq):
            number = item.head if isinstance(item, Segment) else item.seq
            if number == seq:
                return item.mark
            if number > seq:
                return None
        return None

    def was_at(self, epoch: str, seq: int, mark: bytes) -> bool:
        """Return whether this position is on record, in this history or a former one still on disk.

        A position older than the kept part of its epoch counts as on record.
        """
        paths = [(path, header) for path in segment_paths(self._directory) if (header := header_of(path)) is not None]
        of_epoch = [(path, header) for path, header in paths if header.epoch == epoch]
        for path, header in reversed(of_epoch):
            if header.head <= seq:
                marks = {record.seq: record.mark for record in readable_records(path)}
                return {header.head: header.mark, **marks}.get(seq) == mark
        return bool(of_epoch)

    def _items(self, seq: int) -> Iterator[Segment | Record]:
        paths: list[Path] = []
        epoch = None
        for path in reversed(segment_paths(self._directory)):
            header = header_of(path)
            if header is None or epoch not in (None, header.epoch):
                break  # expired since, damaged, or of a former history
            epoch = header.epoch
            paths.append(path)
            if header.head <= seq:
                break
        for path in reversed(paths):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return  # expired since
            for _, payload in frames(data):
                yield decoder.decode(payload)
